"""What a PhiMoE checkpoint's safetensors hold, under every writer's tensor names, from the headers alone.

Needs neither torch nor safetensors; data.py reads the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phimoe_onnx.checkpoint import fp8
from phimoe_onnx.checkpoint.adapter import Adapter
from phimoe_onnx.checkpoint.headers import DTYPES, Stored, read_header
from phimoe_onnx.checkpoint.names import spellings
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import CheckpointError, ConfigError, brief
from phimoe_onnx.files import read_json

if TYPE_CHECKING:
    import torch

TIED = ("model.embed_tokens.weight", "lm_head.weight")
HEADS = ("lm_head.", "score.")
SCALES = ("_scale_inv", "_scale")  # behind an FP8 tensor's name; both multiply
IGNORED = ("rotary_emb.inv_freq", ".input_scale", ".activation_scale")  # the last two: how FP8 rounds activations
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
OTHERS = ("*.bin", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.safetensors")  # weights in other forms


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `folder` by its stored name, from the shards' headers alone.

    Raises:
        CheckpointError: no safetensors, a shard is missing, truncated, a Git LFS pointer or not safetensors, or the
            index names a tensor that its shard lacks.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: {_no_weights(folder)}")
    files = shard_files(folder)
    if missing := [file for file in files if not (folder / file).exists()]:
        which = "none of them is" if missing == files else f"{len(missing)} of them are not"
        raise CheckpointError(
            f"{folder / missing[0]}: the shard is missing; {INDEX} names {len(files)}, and {which} here; "
            f"download them into this folder"
        )
    shards = {file: read_header(folder / file) for file in files}
    weight_map = _weight_map(folder)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(f"{folder / file}: {INDEX} promises the tensor {name} here, but the shard lacks it")
    return {name: shards[file][name] for name, file in weight_map.items()}


def shard_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights, whether they are there or not: as transformers has it, the only
    one if it is there, else those of the index.

    Raises:
        CheckpointError: the index cannot be read.
    """
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return [SINGLE]
    return sorted(set(_weight_map(folder).values()))


def _no_weights(folder: Path) -> str:
    """Why a folder without its only file and without an index holds no weights."""
    shards = sorted(path.name for path in folder.glob("*.safetensors") if SHARD.fullmatch(path.name))
    if shards:
        return (
            f"holds shards ({shards[0]}, {len(shards)} such), but no {INDEX}, which says what lies in which; "
            f"download it into this folder"
        )
    others = sorted({path.name for pattern in OTHERS for path in folder.glob(pattern)})
    found = f" ({others[0]} is here)" if others else ""
    return (
        f"holds neither {INDEX} nor {SINGLE}{found}; only safetensors checkpoints are read, "
        f"which transformers' save_pretrained writes"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = read_json(folder / INDEX).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(_is_name(file) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map from tensor names to files")
    return weight_map


def _is_name(file: object) -> bool:
    return isinstance(file, str) and len(file.encode("utf-8", "surrogatepass")) < 256


def parameters(
    config: PhiMoEConfig, stored: dict[str, Stored], task: str = "text-generation", adapter: Adapter | None = None
) -> dict[str, tuple[Rows, ...]]:
    """Each parameter of the task's model in modeling.py, by its name there, as the stored rows that make it up, with
    the adapter in them where there is one.

    Raises:
        CheckpointError: a tensor is missing, misshapen, of another dtype, or not accounted for by config.json.
    """
    names = _Names(stored, config.fp8_block)
    rows = {name: tuple(parts) for name, parts in _parameters(config, names, task)}
    unused = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if task == "feature-extraction":  # the body of a model with a head
        unused |= {"lm_head.weight", "lm_head.bias", "score.weight"}
    known = {tensor for name, tensor in names.spelt.items() if name in unused or name.endswith(IGNORED)}
    used = {tensor for parts in rows.values() for part in parts for tensor in (part.tensor, part.scales) if tensor}
    if adapter is not None and config.tie_word_embeddings and adapter.touches(*TIED):
        raise CheckpointError(
            f"{adapter.folder}: changes {TIED[0]} or {TIED[1]}, which are one in this model (tie_word_embeddings) and "
            f"are not merged then; merge the adapter with peft (merge_and_unload), save the model and export that"
        )
    if extra := sorted(set(stored) - used - known):
        raise CheckpointError(
            f"{stored[extra[0]].file}: {extra[0]} ({len(extra)} such) has no place in the model that config.json "
            f"describes; "
            "compare attention_bias, lm_head_bias, num_hidden_layers and num_local_experts with the checkpoint"
        )
    if adapter is None:
        return {name: tuple(part.rows(stored) for part in parts) for name, parts in rows.items()}
    adapter.check_used([*unused, *(part.name for parts in rows.values() for part in parts)])
    return {name: tuple(adapter.merged(part.name, part.rows(stored)) for part in parts) for name, parts in rows.items()}


@dataclass(frozen=True)
class _Part:
    """A stored tensor, or with `index` the 2-d slices of a fused one: expert, first row, last row."""

    tensor: str
    name: str  # of the matrix or vector as the hub's checkpoints have it, by which adapters know it
    index: tuple[int, int, int] | None = None
    scales: str | None = None  # the tensor with an FP8 tensor's
    shared: tuple[int, int] = (1, 1)  # rows and columns with a scale in common

    def rows(self, stored: dict[str, Stored]) -> Rows:
        where = stored[self.tensor]
        shape = where.shape if self.index is None else (self.index[2] - self.index[1], where.shape[2])
        return Rows(shape, lambda: self._read(stored))

    def _read(self, stored: dict[str, Stored]) -> torch.Tensor:
        from phimoe_onnx.checkpoint.data import is_finite, read_tensor  # needs torch, which the headers do not

        file = stored[self.tensor].file
        rows = read_tensor(file, self.tensor, self.index)
        first = 0
        if self.scales is not None:
            scales = read_tensor(stored[self.scales].file, self.scales, None)
            if self.index is not None:
                scales = scales[self.index[0]] if scales.numel() > 1 else scales
                first = self.index[1]
            rows = fp8.numbers(rows, scales, self.shared, first)
        if not is_finite(rows):
            raise CheckpointError(
                f"{file}: {self.tensor} holds numbers that are not finite (NaN or infinity); "
                f"the checkpoint is damaged, or its training was; download or save it again"
            )
        return rows


class _Names:
    """Looks up a tensor under any of its spellings and checks its shape.

    A base model's tensors have the names of a model with a head without the prefix `model.`.
    """

    def __init__(self, stored: dict[str, Stored], fp8_block: tuple[int, int]) -> None:
        self.stored = stored
        self.fp8_block = fp8_block
        self.spelt = spellings(stored)
        self.dropped = "model." if "embed_tokens.weight" in self.spelt else ""

    def has(self, name: str) -> bool:
        return name.removeprefix(self.dropped) in self.spelt

    def part(self, shape: tuple[int, ...], *names: str) -> _Part:
        names = tuple(name.removeprefix(self.dropped) for name in names)
        spelling = next((name for name in names if name in self.spelt), None)
        if spelling is None:
            raise CheckpointError(
                f"the checkpoint lacks the tensor {names[0]}" + "".join(f" (or {name})" for name in names[1:])
            )
        tensor = self.spelt[spelling]
        where = self.stored[tensor]
        if where.shape != shape:
            raise CheckpointError(
                f"{where.file}: {tensor} has the shape {list(where.shape)}, config.json makes it {list(shape)}"
            )
        if where.dtype in fp8.DTYPES:
            return self._with_scales(spelling, tensor, where)
        if where.dtype not in DTYPES:
            raise CheckpointError(
                f"{where.file}: {tensor} is stored as {brief(where.dtype)}, expected one of {', '.join(DTYPES)}"
            )
        return _Part(tensor, self._full(spelling))

    def _with_scales(self, spelling: str, tensor: str, where: Stored) -> _Part:
        scales = next((self.spelt.get(spelling + suffix) for suffix in SCALES if spelling + suffix in self.spelt), None)
        if scales is None or len(where.shape) < 2:
            raise CheckpointError(
                f"{where.file}: {tensor} is stored as {where.dtype} without the scales {spelling}{SCALES[0]} "
                f"or {spelling}{SCALES[1]}; give the checkpoint in one of {', '.join(DTYPES)}, or with its scales"
            )
        found = self.stored[scales]
        shared = fp8.scales_shape(where.shape, found.shape, self.fp8_block)
        if shared is None or found.dtype not in DTYPES:
            raise CheckpointError(
                f"{found.file}: {scales} is {found.dtype} {list(found.shape)}, expected one scale for {tensor} "
                f"{list(where.shape)}, one for each row or one for {list(self.fp8_block)} rows and columns"
            )
        return _Part(tensor, self._full(spelling), scales=scales, shared=shared)

    def _full(self, spelling: str) -> str:
        return spelling if spelling.startswith(HEADS) else self.dropped + spelling


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
            yield name, [replace(names.part(shape, name, mlp.replace("gate.", "router."), mlp), name=name)]
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
        part = names.part(shape, fused)
        for e in range(number):
            for first, matrix in enumerate(matrices):
                own = f"{name.rpartition('.')[0]}.{e}.{matrix}.weight"
                yield replace(part, name=own, index=(e, first * rows, (first + 1) * rows))
    else:
        prefix = name.rpartition(".")[0]
        yield from (
            names.part((rows, k), f"{prefix}.{e}.{matrix}.weight") for e in range(number) for matrix in matrices
        )
