"""How many bytes a decode step must read, and how fast a device reads: together the limit of a step's speed."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from phimoe_onnx.bundle import Manifest
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import PhiMoEError

_BITS = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}
_SHARE = 256 << 20  # bytes that a thread reads in turn: more than any cache


def step_bytes(bundle: Path, manifest: Manifest, batch: int, length: int) -> int:
    """Bytes of weights and cache that a decode step of a bundle for text-generation reads.

    Of the experts those count that some row chose: with each row choosing 2 of E at random, E (1 - (1 - 2 / E) **
    batch) of a layer. An embedding's row, norms and activations are left out.

    Args:
        bundle: the bundle's folder, for its config.json.
        manifest: its manifest.
        batch: rows.
        length: tokens in each row's cache.
    """
    config = read_config(bundle)
    scale = _BITS[manifest.dtype]
    dense = _attention(config) * _bits(manifest, "self_attn.q_proj.weight", scale)
    dense += config.hidden_size * config.num_local_experts * _bits(manifest, "block_sparse_moe.gate.weight", scale)
    experts = config.num_local_experts
    used = experts * (1 - (1 - 2 / experts) ** batch)
    dense += (
        used
        * 3
        * config.hidden_size
        * config.intermediate_size
        * _bits(manifest, "block_sparse_moe.experts.gate_up_proj", scale)
    )
    cache = manifest.decoding.cache
    cached = batch * min(length, config.window or length) * cache.bytes_per_token
    head = config.vocab_size * config.hidden_size * _bits(manifest, "lm_head.weight", scale)
    return int((config.num_hidden_layers * dense + head) / 8) + cached


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes a second that the processor's cores read from memory together, the best of three passes."""
    workers = threads or os.cpu_count() or 1
    arrays = [np.ones(_SHARE // 8) for _ in range(workers)]
    best = 0.0
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))  # numpy's reductions let other threads run
            best = max(best, workers * _SHARE / (time.perf_counter() - start))
    return best


def _attention(config: PhiMoEConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * heads * config.head_dim


def _bits(manifest: Manifest, parameter: str, scale: float) -> float:
    """Bits that a weight of a parameter takes, its share of a block's scale included."""
    stored = next((group for group in manifest.weights if parameter in group.parameters), None)
    if stored is None:
        raise PhiMoEError(f"the manifest does not say how {parameter} is stored; export the bundle again")
    if stored.block_size is None:
        return _BITS[stored.dtype]
    return int(stored.dtype.removeprefix("int")) + scale / stored.block_size
