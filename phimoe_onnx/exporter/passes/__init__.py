"""One file a graph pass."""
