"""One file a weight quantiser."""
