"""The header of a safetensors file: which tensors it holds, of what dtype and shape."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimoe_onnx.checkpoint import fp8
from phimoe_onnx.errors import CheckpointError

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # that weights are read in as they are, and their bytes
BYTES = DTYPES | fp8.DTYPES


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its shard, dtype ("BF16", ...) and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Stored]:
    """The header of one safetensors file: 8 bytes of length, little endian, then JSON; offsets count from its end.

    Raises:
        CheckpointError: the file is missing, truncated, a Git LFS pointer or not safetensors.
    """
    if file.exists() and not file.is_file():  # a pipe would be waited for, a device has no end
        raise CheckpointError(f"{file}: is no readable safetensors file (it is no regular file)")
    try:
        with file.open("rb") as shard:
            start = shard.read(8)
            if start.startswith(b"version "):
                raise CheckpointError(
                    f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` in that folder"
                )
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            size = file.stat().st_size
            header = json.loads(shard.read(length)) if 0 < length <= size - 8 else None
    except FileNotFoundError:
        raise CheckpointError(f"{file}: the shard is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is no readable safetensors file ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: is truncated or no safetensors file; download it again")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: the header's __metadata__ holds what is no text; download the shard again")
    data_bytes = size - 8 - length
    stored = {name: _stored(file, name, entry, data_bytes) for name, entry in header.items()}
    _check_covered(file, [entry["data_offsets"] for entry in header.values()], data_bytes)
    return stored


def _check_covered(file: Path, spans: list[list[int]], data_bytes: int) -> None:
    """Every byte is one tensor's, as safetensors has it."""
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise CheckpointError(
                f"{file}: the header's tensors overlap or leave bytes between them, at byte {begin} of the numbers; "
                f"download the shard again"
            )
        place = end
    if place != data_bytes:
        raise CheckpointError(
            f"{file}: has {data_bytes - place} bytes behind its last tensor, expected none; download the shard again"
        )


def _stored(file: Path, name: str, entry: Any, data_bytes: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError
        if not isinstance(dtype, str):
            raise TypeError
        inside = 0 <= begin <= end <= data_bytes
        whole = end - begin == math.prod(shape) * BYTES[dtype] if dtype in BYTES else True
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: the header's entry for {name} is damaged; download the shard again") from None
    if not inside:
        raise CheckpointError(
            f"{file}: is truncated, {name} ends {end - data_bytes} bytes past its end; download it again"
        )
    if not whole:
        raise CheckpointError(
            f"{file}: {name} has {end - begin} bytes, which do not fit {dtype} {list(shape)}; download the shard again"
        )
    return Stored(file, dtype, shape)
