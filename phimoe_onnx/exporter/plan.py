"""What an export would write and need, and what its bundle would need to run: from config.json and the recipe alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from phimoe_onnx.checkpoint.tensors import shapes
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.kinds import kind
from phimoe_onnx.exporter.quantize.format import WIDTHS, Plain
from phimoe_onnx.exporter.quantize.strips import Strips
from phimoe_onnx.exporter.recipe import CALIBRATED, EMBEDDING, HEAD, MIXED, Recipe, bits_per_weight
from phimoe_onnx.exporter.rope import rope_rows
from phimoe_onnx.scratch import LIMIT

# Bytes, measured with torch 2.13 and ONNX Runtime 1.32 on Linux.
EXPORTER = 1000 << 20  # resident beside the weights at hand: torch, the traced graph, what the allocator keeps
RUNTIME = 90 << 20  # resident before the first weight: Python, numpy, ONNX Runtime, a tokenizer
GRAPH_PER_LAYER = {"fused": 10_700, "branches": 0, "native": 7_000}
GRAPH_PER_EXPERT = {"fused": 0, "branches": 6_560, "native": 0}
CALIBRATION_TOKENS = 65_536  # that a calibration reads unless it is told a number
LEAST_CALIBRATION_TOKENS = 256
CALIBRATION_ROWS = 4096  # of a matrix at once
CACHE_BYTES = {"fp16": 2.0, "int8": 1.0, "int4": 0.5}  # of a channel


@dataclass(frozen=True)
class Requirements:
    """Of one recipe, in bytes.

    Attributes:
        bundle: on disk, and so free on disk to export, with `calibration`.
        export_memory: the export's resident peak on this machine's cores.
        run_memory: resident after loading on the target's device, without a cache.
        cache_per_token: of one row's cache.
        calibration: on disk while it runs, beside the bundle and in the folder for temporary files; 0 without one.
    """

    bundle: int
    export_memory: int
    run_memory: int
    cache_per_token: int
    calibration: int = 0


@dataclass(frozen=True)
class Machine:
    """Bytes that are free here; `memory` is None where the system does not say, `gpu` without an NVIDIA card."""

    disk: int
    memory: int | None
    gpu: int | None


def count_parameters(config: PhiMoEConfig, task: str = "text-generation") -> dict[str, int]:
    """The parameters of a task's model by kind, the most first."""
    counts: Counter[str] = Counter()
    for name, shape in shapes(config, task).items():
        counts[kind(name)] += prod(shape)
    return dict(counts.most_common())


def requirements(config: PhiMoEConfig, recipe: Recipe, calibration_tokens: int = CALIBRATION_TOKENS) -> Requirements:
    """What an export by a recipe takes, and what running its bundle takes."""
    target, width = recipe.target, WIDTHS[recipe.dtype]
    tables = 2 * rope_rows(config) * config.head_dim // 2 * width if target.attention == "GroupQueryAttention" else 0
    layers, experts = config.num_hidden_layers, config.num_local_experts
    graphs = sum(
        layers * (GRAPH_PER_LAYER[way] + experts * GRAPH_PER_EXPERT[way]) for way, _ in recipe.graphs().values()
    )
    stored, resident = _weights(config, recipe)
    memory, disk = _calibration(config, calibration_tokens) if recipe.rounding == CALIBRATED else (0, 0)
    if recipe.quantize == MIXED:
        memory = max(memory, _measuring(config))
    channel = CACHE_BYTES.get(recipe.kv_cache, width)
    cached = recipe.task == "text-generation"
    return Requirements(
        bundle=stored + tables + graphs,
        export_memory=EXPORTER + max(memory, _largest_jobs(config, recipe)),
        run_memory=RUNTIME + resident + (0 if target.expands else tables),
        cache_per_token=int(2 * layers * config.num_key_value_heads * config.head_dim * channel) if cached else 0,
        calibration=disk + (stored if disk else 0),
    )


def tokens_to_read(calibrate: bool, tokens: int | None) -> int:
    """How many tokens of a text a calibration reads at the most: so many as asked for, or the default.

    Raises:
        ExportError: there is no calibration, or they are too few.
    """
    if tokens is None:
        return CALIBRATION_TOKENS
    if not calibrate:
        raise ExportError("--calibration-tokens says how much --calibrate reads, which is not given; add it")
    if not isinstance(tokens, int) or tokens < LEAST_CALIBRATION_TOKENS:
        raise ExportError(
            f"--calibration-tokens is {tokens!r}, expected a whole number of at least {LEAST_CALIBRATION_TOKENS}; the "
            f"default is {CALIBRATION_TOKENS}"
        )
    return tokens


def _calibration(config: PhiMoEConfig, tokens: int) -> tuple[int, int]:
    """Bytes that a calibration takes in memory, and on disk beside the matrices: by arithmetic, for so many
    tokens.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    states = 4 * tokens * (4 * hidden + max(2 * heads, inner))
    in_memory = min(states, LIMIT)
    widest, matrix, vocabulary = max(hidden, inner, heads), inner * hidden, config.vocab_size * hidden
    # an expert and its first matrix rounded, moments with factors and pooled moments, a slab of rows in its forms
    expert = 5 * matrix + 5 * widest**2 + 2 * hidden**2 + 6 * CALIBRATION_ROWS * widest
    head = 2 * vocabulary + vocabulary // 2 + 5 * hidden**2 + 3 * CALIBRATION_ROWS * hidden  # and its codes, twice
    return in_memory + 4 * max(expert, head), states - in_memory + 4 * 4 * tokens * hidden


def _measuring(config: PhiMoEConfig) -> int:
    """Bytes that it took to choose widths."""
    from phimoe_onnx.exporter import widths  # has PyTorch, which is here already when widths were chosen
    from phimoe_onnx.exporter.quantize.measure import memory

    return memory(config, len(widths.WIDTHS), widths.TOKENS)


def _weights(config: PhiMoEConfig, recipe: Recipe) -> tuple[int, int]:
    """Bytes of all weights as they are stored, and in memory after loading."""
    known = shapes(config, recipe.task)
    known.setdefault(HEAD, known[EMBEDDING])  # a tied head is stored by itself
    stored = resident = 0
    for name, forms in recipe.forms.items():
        *outer, k = known[name]
        n = prod(outer) // len(forms)
        for form in forms:
            parts = form.nbytes(n, k)
            stored += sum(parts)
            if not recipe.target.expands or isinstance(form, Strips):  # strips stay in the file, mapped
                resident += sum(parts)
            elif isinstance(form, Plain):
                resident += n * k * WIDTHS["float32"]  # on the CPU float16 becomes float32
            elif name != EMBEDDING:  # its blocks stay in the file, where a token's row is read
                resident += sum(parts) + parts[1]  # ONNX Runtime adds the sum of each block
    return stored, resident


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
    return Machine(shutil.disk_usage(folder).free, _free_memory(), gpu)


def _free_memory() -> int | None:
    """Bytes of memory that programs can have; None where neither Linux nor psutil says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    return int(psutil.virtual_memory().available)


def _largest_jobs(config: PhiMoEConfig, recipe: Recipe) -> int:
    """Bytes of the memory that the writer's workers hold at worst: one the head, the others an expert's fc1 each."""
    head = config.vocab_size * config.hidden_size
    expert = 2 * config.intermediate_size * config.hidden_size
    blocks = [form for forms in recipe.forms.values() for form in forms if not isinstance(form, Plain)]
    if not blocks:  # as stored, cast and transposed; the head is so large that it outlasts the experts
        return head * (2 + 2 * WIDTHS[recipe.dtype])
    packed = max(bits_per_weight(form) for form in blocks if form.bits == min(each.bits for each in blocks)) / 8
    return int(head * (2 + packed) + (_workers() - 1) * expert * (1 + 2 * packed))


def _workers() -> int:
    return os.cpu_count() or 1
