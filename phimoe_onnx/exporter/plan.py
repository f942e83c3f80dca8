"""What an export would write and need, and what its bundle would need to run: from config.json and the shards' headers
alone.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from phimoe_onnx.checkpoint.tensors import Rows
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.formats import format_for
from phimoe_onnx.exporter.kinds import kind
from phimoe_onnx.exporter.passes.attention import rope_rows
from phimoe_onnx.exporter.quantize.rtn import Format

# Bytes, measured with torch 2.13 and ONNX Runtime 1.32 on Linux.
EXPORTER = 1000 << 20  # resident beside the weights at hand: torch, the traced graph, what the allocator keeps
RUNTIME = 90 << 20  # resident before the first weight: Python, numpy, ONNX Runtime, a tokenizer
GRAPH_PER_LAYER = 10_700  # without branches
BRANCHES_PER_EXPERT = 6_560
EXACT = ("router", "score")  # kinds of weights that are float32 in every form


@dataclass(frozen=True)
class Requirements:
    """Of one target and form, in bytes.

    Attributes:
        bundle: on disk, and so free on disk to export.
        export_memory: the export's resident peak on this machine's cores.
        run_memory: resident after loading on the target's device, without a cache.
        cache_per_token: of one row's cache.
    """

    target: str
    quantize: str
    bundle: int
    export_memory: int
    run_memory: int
    cache_per_token: int


@dataclass(frozen=True)
class Machine:
    """Bytes that are free here; `gpu` is None without an NVIDIA card."""

    disk: int
    memory: int
    gpu: int | None


def count_parameters(config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]]) -> dict[str, int]:
    """The checkpoint's parameters by kind, the most first."""
    counts: Counter[str] = Counter()
    for name, parts in rows.items():
        counts[kind(name)] += _elements(parts)
    return dict(counts.most_common())


def requirements(
    config: PhiMoEConfig,
    rows: dict[str, tuple[Rows, ...]],
    target: str,
    quantize: str,
    block_size: int | None,
    task: str = "text-generation",
) -> Requirements:
    """What exporting a checkpoint to `target` and `quantize` and running the result takes.

    Args:
        config: the checkpoint's shape.
        rows: its parameters, as `checkpoint.parameters` gives them; nothing is read.
        target: "cpu", "cuda" or "portable".
        quantize: "none", "fp16", "int8" or "int4".
        block_size: as for `export`.
        task: one of bundle.TASKS.

    Raises:
        ExportError: the target or the quantiser does not take the model's shape or these options.
    """
    format = format_for(config, target, quantize, block_size)
    width = 2 if target == "cuda" else 4  # bytes of an activation
    if task == "text-generation" and config.tie_word_embeddings:  # the two uses are stored apart, each as it is read
        rows = rows | {"lm_head.weight": rows["model.embed_tokens.weight"]}
    stored = resident = 0
    for name, parts in rows.items():
        matrix = len(parts[0].shape) > 1 and kind(name) not in ("norms", *EXACT)
        form = (
            None
            if not matrix
            else Format(8, format.block_size, format.dtype)
            if format and kind(name) == "embeddings"
            else format
        )
        elements = _elements(parts)
        if form is None:
            plain = 4 if kind(name) in EXACT else 2 if matrix and quantize == "fp16" else width
            stored += elements * plain
            resident += elements * (plain if target == "cuda" else 4)  # on the CPU float16 becomes float32
            continue
        codes, scales = form.nbytes(elements // parts[0].shape[-1], parts[0].shape[-1])
        stored += codes + scales
        if target == "cuda":
            resident += codes + scales
        elif kind(name) != "embeddings":  # these stay in the file, where a token's row is read
            resident += codes + 2 * scales  # ONNX Runtime adds the sum of each block
    tables = 0 if target == "portable" else 2 * rope_rows(config) * config.head_dim // 2 * width
    layers = config.num_hidden_layers
    fused = layers * GRAPH_PER_LAYER if target == "cuda" or format else 0
    branched = layers * config.num_local_experts * BRANCHES_PER_EXPERT
    graphs = {"portable": branched, "cuda": fused, "cpu": branched + (fused or branched)}[target]
    return Requirements(
        target=target,
        quantize=quantize,
        bundle=stored + tables + graphs,
        export_memory=EXPORTER + _largest_jobs(config, format, width),
        run_memory=RUNTIME + resident + (tables if target == "cuda" else 0),
        cache_per_token=0
        if task != "text-generation"
        else 2 * layers * config.num_key_value_heads * config.head_dim * width,
    )


def this_machine(folder: Path) -> Machine:
    """What is free here: on the disk of `folder`, in memory, and on the first NVIDIA card."""
    while not folder.exists():
        folder = folder.parent
    gpu = None
    if nvidia_smi := shutil.which("nvidia-smi"):
        query = [nvidia_smi, "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip().isdigit():
            gpu = int(answer.stdout) << 20
    return Machine(shutil.disk_usage(folder).free, psutil.virtual_memory().available, gpu)


def _elements(parts: tuple[Rows, ...]) -> int:
    return sum(math.prod(part.shape) for part in parts)


def _largest_jobs(config: PhiMoEConfig, format: Format | None, width: int) -> int:
    """Bytes of the memory that the writer's workers hold at worst: one the head, the others an expert's fc1 each."""
    head = config.vocab_size * config.hidden_size
    expert = 2 * config.intermediate_size * config.hidden_size
    if format is None:  # as stored, cast and transposed; the head is so large that it outlasts the experts
        return head * (2 + 2 * width)
    codes_and_scales = sum(format.nbytes(1, format.block_size)) / format.block_size
    return int(head * (2 + codes_and_scales) + (_workers() - 1) * expert * (1 + 2 * codes_and_scales))


def _workers() -> int:
    return os.cpu_count() or 1
