"""A bundle held against the PyTorch reference."""
