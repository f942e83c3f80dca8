"""The sizes of the rope tables that GroupQueryAttention reads."""

from __future__ import annotations

from phimoe_onnx.config import PhiMoEConfig


def short_rows(config: PhiMoEConfig) -> int:
    """How many rows of the short factors come first; 0 without longrope."""
    if config.longrope is None:
        return 0
    return min(config.longrope.original_max_position_embeddings, config.max_position_embeddings)


def rope_rows(config: PhiMoEConfig) -> int:
    """How many rows each table has: with longrope those of the short factors, then one for every position."""
    return short_rows(config) + config.max_position_embeddings
