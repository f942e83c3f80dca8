"""Tokenizer and chat template as files, read alike by exporter and runtime."""
