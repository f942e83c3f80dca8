"""Manifests of version 1, whose bundles go on to be read."""

from __future__ import annotations

import re
from typing import Any

# What version 1 called the kinds of weights, and modeling.py's names of them; it said nothing of vectors.
_LAYERS = {
    "experts": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    "attention": tuple(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    "router": ("block_sparse_moe.gate.weight",),
}
_WHOLE = {"embeddings": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "score": "score.weight"}


def upgrade(raw: dict[str, Any]) -> dict[str, Any]:
    """The parsed manifest in the form of version 2.

    One target stood for what the graphs' `devices` say now, a graph's `minimum_onnxruntime` for their releases, and a
    text such as "int4, block 32" for how a kind of weights is stored. What is not as version 1 has it stays, and
    whoever checks the result finds it.
    """
    target, dtype = raw.get("target"), raw.get("dtype")
    upgraded = raw | {"format_version": 2, "weights": _weights(raw)}
    if isinstance(graphs := raw.get("graphs"), list):
        upgraded["graphs"] = [_graph(graph, target, dtype) if isinstance(graph, dict) else graph for graph in graphs]
    decoding, files = raw.get("decoding"), raw.get("files")
    if isinstance(decoding, dict) and isinstance(files, dict) and "sampling.onnx" in files:
        upgraded["decoding"] = decoding | {"sampling_graph": "sampling.onnx"}
    return upgraded


def _graph(graph: dict[str, Any], target: Any, dtype: Any) -> dict[str, Any]:
    release = graph.get("minimum_onnxruntime")
    devices = {"cpu": release, "cuda": release} if target == "portable" else {str(target): release}
    if target == "cuda" and dtype == "float16":  # the release whose float16 MoE on the CPU is right
        devices["cpu"] = "1.32"
    return graph | {"devices": devices}


def _weights(raw: dict[str, Any]) -> list[dict[str, Any]]:
    stored, decoding = raw.get("weights"), raw.get("decoding")
    cache = decoding.get("cache") if isinstance(decoding, dict) else None
    layers = cache.get("num_hidden_layers") if isinstance(cache, dict) else None
    if not isinstance(stored, dict) or not isinstance(layers, int):
        return []
    groups = []
    for kind, text in stored.items():
        if kind in _LAYERS:
            groups.append({"parameters": _LAYERS[kind], "layers": [0, layers - 1], **_form(text, raw.get("dtype"))})
        elif kind in _WHOLE:
            groups.append({"parameters": [_WHOLE[kind]], "layers": None, **_form(text, raw.get("dtype"))})
    return groups


def _form(text: Any, dtype: Any) -> dict[str, Any]:
    blocks = re.fullmatch(r"(int[48]), block (\d{1,9})", text) if isinstance(text, str) else None
    return {"dtype": blocks[1], "block_size": int(blocks[2]), "scale_dtype": dtype} if blocks else {"dtype": text}
