"""How many bytes a decode step must read, and how fast a device reads: together the limit of a step's speed."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.bundle import Manifest, StoredWeights
from phimoe_onnx.config import PhiMoEConfig, read_config

_BITS = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0} | {f"int{bits}": float(bits) for bits in (8, 4, 3, 2)}
_SHARE = 256 << 20  # bytes that a thread reads in turn: more than any cache
_EXPERTS = "block_sparse_moe.experts."


def step_bytes(bundle: Path, manifest: Manifest, batch: int, length: int) -> int:
    """Bytes of weights and cache that a decode step of a bundle for text-generation reads.

    Of the experts those count that some row chose: with each row choosing 2 of E at random, E (1 - (1 - 2 / E) **
    batch) of a layer. An embedding's row, norms and biases are left out.

    Args:
        bundle: the bundle's folder, for its config.json.
        manifest: its manifest.
        batch: rows.
        length: tokens in each row's cache.
    """
    config = read_config(bundle)
    sizes = _matrices(config)
    chosen = 1 - (1 - 2 / config.num_local_experts) ** batch
    bits = 0.0
    for group in manifest.weights:
        layers = 1 if group.layers is None else group.layers[1] - group.layers[0] + 1
        for name in group.parameters:
            weights = sizes.get(name, 0)
            if (stack := name.rpartition(".")[0]) in sizes and name not in sizes:  # NAME.EXPERT, where experts differ
                weights = sizes[stack] // config.num_local_experts
            share = chosen if _EXPERTS in name else 1.0
            bits += layers * weights * share * _bits(group)
    cached = batch * min(length, config.window or length) * manifest.decoding.cache.bytes_per_token
    return int(bits / 8) + cached


def read_bandwidth(threads: int | None = None, file: Path | None = None) -> float:
    """Bytes a second that the processor's cores read from memory together, the best of three passes.

    Args:
        threads: how many cores; None for all.
        file: what to read, mapped, as a graph's weights are; None for memory of the process's own.
    """
    workers = threads or os.cpu_count() or 1
    arrays: list[NDArray[Any]] = [np.ones(_SHARE // 8) for _ in range(workers)] if file is None else []
    if file is not None:
        arrays = np.array_split(np.memmap(file, np.int32, "r", shape=file.stat().st_size // 4), workers)
    best = 0.0
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))  # numpy's reductions let other threads run
            best = max(best, sum(each.nbytes for each in arrays) / (time.perf_counter() - start))
    return best


def _matrices(config: PhiMoEConfig) -> dict[str, int]:
    """How many weights each matrix that a step reads has, by the manifest's names."""
    hidden, experts = config.hidden_size, config.num_local_experts
    heads = {"q": config.num_attention_heads, "o": config.num_attention_heads}
    heads |= {"k": config.num_key_value_heads, "v": config.num_key_value_heads}
    attention = {f"self_attn.{part}_proj.weight": hidden * heads[part] * config.head_dim for part in heads}
    return attention | {
        "block_sparse_moe.gate.weight": hidden * experts,
        f"{_EXPERTS}gate_up_proj": experts * 2 * config.intermediate_size * hidden,
        f"{_EXPERTS}down_proj": experts * config.intermediate_size * hidden,
        "lm_head.weight": config.vocab_size * hidden,
    }


def _bits(stored: StoredWeights) -> float:
    """Bits that a weight takes, with its share of a block's scale and zero point."""
    if stored.block_size is None:
        return _BITS[stored.dtype]
    if stored.layout == "strips":  # an integer of 4 bits for a block, beside 8-bit levels none; S is next to nothing
        return _BITS[stored.dtype] + (0.0 if stored.dtype == "int8" else 4 / stored.block_size)
    beside = _BITS[stored.scale_dtype or "float32"] + (0.0 if stored.symmetric else _BITS[stored.dtype])
    return _BITS[stored.dtype] + beside / stored.block_size
