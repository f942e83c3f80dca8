"""Which tasks, targets and stored forms there are, and the block-wise format that a model's shape takes."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.bundle import TASKS
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.passes import attention
from phimoe_onnx.exporter.quantize.rtn import Format

TARGETS = ("cpu", "cuda", "portable")
DTYPES = {
    "cpu": {"float32": ir.DataType.FLOAT},
    "cuda": {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16},
    "portable": {"float32": ir.DataType.FLOAT},
}
QUANTIZE = ("none", "fp16", "int8", "int4")
KV_CACHE = ("none", "int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)
LARGEST_DEFAULT_BLOCK = 64
CUDA_TILE = 64  # QMoE's packed weights are made of tiles of so many columns


def activation_dtype(target: str, dtype: str | None = None) -> ir.DataType:
    """The dtype of activations and cache: the one that is asked for, else the target's first.

    Raises:
        ExportError: the target does not know it.
    """
    known = DTYPES[target]
    if dtype is None:
        return next(iter(known.values()))
    if dtype not in known:
        raise ExportError(f"--target {target} has no --dtype {dtype}, expected {' or '.join(known)}")
    return known[dtype]


def check_names(target: str, quantize: str, kv_cache: str = "none", task: str | None = None) -> None:
    """Raises ExportError for an unknown target, form or task, or a cache that the target does not know."""
    if target not in TARGETS:
        raise ExportError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if quantize not in QUANTIZE:
        raise ExportError(f"quantize is {quantize!r}, expected one of {', '.join(QUANTIZE)}")
    if kv_cache not in KV_CACHE:
        raise ExportError(f"kv_cache is {kv_cache!r}, expected one of {', '.join(KV_CACHE)}")
    if target == "portable" and kv_cache != "none":
        raise ExportError(
            f"--target portable has no --kv-cache {kv_cache}: the standard operators keep keys and values as they are"
        )
    if task not in (None, *TASKS):
        raise ExportError(f"task is {task!r}, expected one of {', '.join(TASKS)}")


def task_for(config: PhiMoEConfig, task: str | None, source: object, kv_cache: str = "none") -> str:
    """The task that a bundle of the checkpoint `source` serves: the one that is asked for, else the one it was made
    for.

    Raises:
        ExportError: the checkpoint lacks the head that the task needs, or the task has no cache of the form that is
            asked for.
    """
    made_for = config.task or task or "text-generation"
    if task not in (None, made_for, "feature-extraction"):
        served = " or ".join(dict.fromkeys((made_for, "feature-extraction")))
        raise ExportError(f"{source}: was made for {made_for} and has no head for {task}; use --task {served}")
    task = task or made_for
    if task != "text-generation" and kv_cache != "none":
        raise ExportError(f"--task {task} has no --kv-cache {kv_cache}: it runs whole texts without a cache")
    return task


def format_for(
    config: PhiMoEConfig, target: str, quantize: str, block_size: int | None, dtype: str | None = None
) -> Format | None:
    """How the experts and projections are stored, None where they are not quantised.

    Args:
        config: the model's shape.
        target: one of TARGETS.
        quantize: one of QUANTIZE.
        block_size: None is the largest number up to 64 that divides the widths.
        dtype: of activations and scales; None is the target's own.

    Raises:
        ExportError: the target or the quantiser does not take the model's shape or this block size.
    """
    if target == "portable" and quantize.startswith("int"):
        raise ExportError(
            f"--target portable has no {quantize}: the standard operators it is made of know no block-wise weights; "
            f"use none or fp16"
        )
    if target != "portable":
        attention.check(config)
    if not quantize.startswith("int"):
        return None
    if target == "cuda" and (config.hidden_size % CUDA_TILE or config.intermediate_size % CUDA_TILE):
        raise ExportError(
            f"--target cuda has no {quantize} for hidden_size {config.hidden_size} and intermediate_size "
            f"{config.intermediate_size}: "
            f"ONNX Runtime's QMoE needs multiples of {CUDA_TILE} there; use --quantize none"
        )
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
    }
    fitting = [size for size in BLOCK_SIZES if not any(width % size for width in widths.values())]
    if block_size is None:
        block_size = max((size for size in fitting if size <= LARGEST_DEFAULT_BLOCK), default=LARGEST_DEFAULT_BLOCK)
    if block_size not in fitting:
        shapes = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ExportError(
            f"--block-size is {block_size}, but it must divide {shapes}; choose from {fitting or 'none: use fp16'}"
        )
    return Format(int(quantize[3:]), block_size, activation_dtype(target, dtype))
