"""Kinds of weights, by which sizes are reported and planned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

_KINDS = (
    (".experts.", "experts"),
    (".gate.", "router"),
    (".self_attn.", "attention"),
    ("embed_tokens", "embeddings"),
    ("lm_head", "lm_head"),
    ("score", "score"),
    ("norm", "norms"),
    ("cos_cache", "rope tables"),
    ("sin_cache", "rope tables"),
)


def kind(name: str) -> str:
    """The kind of a checkpoint's parameter or of a graph's initializer, by its name."""
    return next((kind for part, kind in _KINDS if part in name), "other")


def stored_sizes(bundle: Path) -> dict[str, int]:
    """Bytes of the weights in a bundle's data files, by kind, the largest first."""
    import onnx_ir as ir  # needs the extra [export], which names and their kinds do not

    sizes: Counter[str] = Counter()
    for name, value in ir.load(bundle / "model.onnx").graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            sizes[kind(name)] += value.const_value.nbytes
    return dict(sizes.most_common())
