"""Classifiers and base models, as transformers writes and runs them: 4.57 for everything but head_dim, 5 for head_dim."""
