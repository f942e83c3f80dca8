"""Inputs as users might hand them in: a seed makes each of them from a sound one, and each is held against the answer."""
