"""Tests against the oracle, transformers; noxfile.py installs it."""
