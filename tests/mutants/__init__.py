"""Inputs as users might hand them in: a seed makes each from a sound one, and each is held against the right answer."""
