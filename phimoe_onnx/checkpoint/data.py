"""The numbers of a checkpoint's tensors; tensors.py knows where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.errors import CheckpointError


def read_rows(rows: Sequence[Rows]) -> torch.Tensor:
    """All rows at once, float32."""
    joined = torch.empty(sum(part.shape[0] for part in rows), *rows[0].shape[1:])
    start = 0
    for part in rows:
        joined[start : start + part.shape[0]] = part.read()
        start += part.shape[0]
    return joined


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of the tensor is NaN or infinite; in one pass and without a copy."""
    return all(math.isfinite(float(bound)) for bound in tensor.aminmax())


def read_tensor(file: Path, tensor: str, index: tuple[int, int, int] | None) -> torch.Tensor:
    """A stored tensor in its own dtype, or with `index` a 2-d slice of a stack: expert, first row, last row.

    Raises:
        CheckpointError: the file is damaged or gone.
    """
    try:
        with safe_open(file, framework="pt") as shard:
            rows: torch.Tensor
            if index is None:
                rows = shard.get_tensor(tensor)
            else:
                expert, first, last = index
                rows = shard.get_slice(tensor)[expert, first:last]
            return rows
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {tensor} cannot be read ({error})") from None
