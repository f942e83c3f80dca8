"""What a PhiMoE checkpoint's safetensors hold, under every writer's tensor names, from the headers alone.

Needs neither torch nor safetensors; data.py reads the numbers.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import CheckpointError, ConfigError
from phimoe_onnx.files import read_json

if TYPE_CHECKING:
    import torch

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its shard, dtype ("BF16", ...) and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `folder` by its stored name, from the shards' headers alone.

    Raises:
        CheckpointError: no safetensors, a shard is missing, truncated, a Git LFS pointer or not safetensors, or the
            index names a tensor that its shard lacks.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(
                f"{folder}: holds neither {INDEX} nor {SINGLE}; only safetensors checkpoints are read"
            )
        return _read_header(folder / SINGLE)
    shards = {file: _read_header(folder / file) for file in shard_files(folder)}
    weight_map = _weight_map(folder)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(f"{folder / file}: {INDEX} promises the tensor {name} here, but the shard lacks it")
    return {name: shards[file][name] for name, file in weight_map.items()}


def shard_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights, whether they are there or not: those of the index, or the only one.

    Raises:
        CheckpointError: the index cannot be read.
    """
    return sorted(set(_weight_map(folder).values())) if (folder / INDEX).exists() else [SINGLE]


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = read_json(folder / INDEX).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map from tensor names to files")
    return weight_map


def parameters(
    config: PhiMoEConfig, stored: dict[str, Stored], task: str = "text-generation"
) -> dict[str, tuple[Rows, ...]]:
    """Each parameter of the task's model in modeling.py, by its name there, as the stored rows that make it up.

    Raises:
        CheckpointError: a tensor is missing, misshapen, of another dtype, or not accounted for by config.json.
    """
    rows = {name: tuple(parts) for name, parts in _parameters(config, _Names(stored), task)}
    known = {name for name, _ in stored.items() if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        known.add("lm_head.weight")
    if task == "feature-extraction":  # the body of a model with a head
        known |= {"lm_head.weight", "lm_head.bias", "score.weight"}
    used = {part.tensor for parts in rows.values() for part in parts}
    if extra := sorted(set(stored) - used - known):
        raise CheckpointError(
            f"{stored[extra[0]].file}: {extra[0]} ({len(extra)} such) has no place in the model that config.json "
            f"describes; "
            "compare attention_bias, lm_head_bias, num_hidden_layers and num_local_experts with the checkpoint"
        )
    return {name: tuple(part.rows(stored) for part in parts) for name, parts in rows.items()}


@dataclass(frozen=True)
class _Part:
    """A stored tensor, or with `index` the 2-d slices of a fused one: expert, first row, last row."""

    tensor: str
    index: tuple[int, int, int] | None = None

    def rows(self, stored: dict[str, Stored]) -> Rows:
        where = stored[self.tensor]
        shape = where.shape if self.index is None else (self.index[2] - self.index[1], where.shape[2])
        return Rows(shape, lambda: _read(where.file, self.tensor, self.index))


class _Names:
    """Looks up a tensor under any of its spellings and checks its shape.

    A base model's tensors have the names of a model with a head without the prefix `model.`.
    """

    def __init__(self, stored: dict[str, Stored]) -> None:
        self.stored = stored
        self.dropped = "model." if "embed_tokens.weight" in stored else ""

    def has(self, name: str) -> bool:
        return name.removeprefix(self.dropped) in self.stored

    def part(self, shape: tuple[int, ...], *names: str) -> _Part:
        names = tuple(name.removeprefix(self.dropped) for name in names)
        for name in names:
            if where := self.stored.get(name):
                if where.shape != shape:
                    raise CheckpointError(
                        f"{where.file}: {name} has the shape {list(where.shape)}, config.json makes it {list(shape)}"
                    )
                if where.dtype not in DTYPES:
                    raise CheckpointError(
                        f"{where.file}: {name} is stored as {where.dtype}, expected one of {', '.join(DTYPES)}"
                    )
                return _Part(name)
        raise CheckpointError(
            f"the checkpoint lacks the tensor {names[0]}" + "".join(f" (or {name})" for name in names[1:])
        )


def shapes(config: PhiMoEConfig, task: str = "text-generation") -> dict[str, tuple[int, ...]]:
    """Each parameter of the task's model in modeling.py with its shape there; a tied head is none of its own."""
    h, v = config.hidden_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    e, i = config.num_local_experts, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for layer in (f"model.layers.{n}." for n in range(config.num_hidden_layers)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{layer}{norm}.weight": (h,), f"{layer}{norm}.bias": (h,)}
        for proj, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            found[f"{layer}self_attn.{proj}_proj.weight"] = (rows, columns)
            if config.attention_bias:
                found[f"{layer}self_attn.{proj}_proj.bias"] = (rows,)
        moe = f"{layer}block_sparse_moe."
        found |= {f"{moe}gate.weight": (e, h), f"{moe}experts.gate_up_proj": (e, 2 * i, h)}
        found[f"{moe}experts.down_proj"] = (e, h, i)
    found |= {"model.norm.weight": (h,), "model.norm.bias": (h,)}
    if task == "text-classification":
        found["score.weight"] = (len(config.labels), h)
    if task == "text-generation" and not config.tie_word_embeddings:
        found["lm_head.weight"] = (v, h)
    if task == "text-generation" and config.lm_head_bias:
        found["lm_head.bias"] = (v,)
    return found


def _parameters(config: PhiMoEConfig, names: _Names, task: str) -> Iterator[tuple[str, list[_Part]]]:
    for name, shape in shapes(config, task).items():
        mlp = name.replace("block_sparse_moe.", "mlp.")
        if name.endswith(".gate.weight"):
            yield name, [names.part(shape, name, mlp.replace("gate.", "router."), mlp)]
        elif ".experts." in name:
            yield name, list(_experts(names, name, mlp, shape))
        else:
            yield name, [names.part(shape, name)]


def _experts(names: _Names, name: str, mlp: str, shape: tuple[int, ...]) -> Iterator[_Part]:
    """The parts of a stack of experts [E, N, K]: of each expert gate and then up, [I, H] each, or down, [H, I]."""
    number, n, k = shape
    matrices = ("w1", "w3") if name.endswith("gate_up_proj") else ("w2",)
    rows = n // len(matrices)
    kind = name.rpartition(".")[2]
    if fused := next((stack for stack in (mlp, name) if names.has(stack.replace(kind, "gate_up_proj"))), None):
        tensor = names.part(shape, fused).tensor
        yield from (_Part(tensor, (e, first, first + rows)) for e in range(number) for first in range(0, n, rows))
    else:
        prefix = name.rpartition(".")[0]
        yield from (
            names.part((rows, k), f"{prefix}.{e}.{matrix}.weight") for e in range(number) for matrix in matrices
        )


def _read(file: Path, tensor: str, index: tuple[int, int, int] | None) -> torch.Tensor:
    from phimoe_onnx.checkpoint.data import read_tensor  # needs torch, which the headers do not

    return read_tensor(file, tensor, index)


def _read_header(file: Path) -> dict[str, Stored]:
    """The header of one safetensors file: 8 bytes of length, little endian, then JSON; offsets count from its end."""
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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is no readable safetensors file ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: is truncated or no safetensors file; download it again")
    header.pop("__metadata__", None)
    return {name: _stored(file, name, entry, size - 8 - length) for name, entry in header.items()}


def _stored(file: Path, name: str, entry: Any, data_bytes: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        inside = 0 <= begin <= end <= data_bytes
        whole = end - begin == math.prod(shape) * DTYPES[dtype] if dtype in DTYPES else True
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
