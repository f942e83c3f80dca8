"""Every writer's tensor names and files give the same parameters, and each damage one CheckpointError that names it."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phimoe_onnx.checkpoint import source
from phimoe_onnx.checkpoint.data import read_rows
from phimoe_onnx.checkpoint.tensors import INDEX, SINGLE, parameters, read_headers
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import CheckpointError
from phimoe_onnx.reference import load_reference
from tests.checkpoints import BASE, SHAPES, make_model, write_checkpoint

Tensors = dict[str, torch.Tensor]
SHARD = "model-00002-of-00003.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4825360\n"


def read(folder: Path) -> Tensors:
    """Every parameter, by its name in modeling.py and in the shape that it has there."""
    rows = parameters(read_config(folder), read_headers(folder))
    shapes = {name: parameter.shape for name, parameter in load_reference(folder).named_parameters()}
    return {name: read_rows(parts).view(shapes[name]) for name, parts in rows.items()}


def check(folder: Path) -> dict[str, Any]:
    return parameters(read_config(folder), read_headers(folder))


@pytest.mark.parametrize("shape", ["plain", "no-bias", "tied", "experts", "head_dim"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("writer", ["hub", "fused"])
def test_every_spelling_gives_the_same_parameters(tmp_path: Path, writer: str, shards: int, shape: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", writer, shards, **SHAPES[shape])
    expected = dict(make_model(BASE | SHAPES[shape]).named_parameters())
    found = read(folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    for name, parameter in load_reference(folder).named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("writer", ["hub", "fused"])
def test_every_dtype_is_read_as_it_is_stored(tmp_path: Path, writer: str, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", writer, dtype=dtype)
    rows = check(folder)
    expected = dict(make_model(BASE).named_parameters())
    assert rows.keys() == expected.keys()
    for name, parts in rows.items():
        assert {part.read().dtype for part in parts} == {dtype}
        assert all(part.read().shape == part.shape for part in parts)
        assert torch.equal(read_rows(parts).flatten(), expected[name].to(dtype).float().flatten()), name


def test_other_spellings_of_router_and_stacks(tmp_path: Path) -> None:
    """`mlp.gate`, and stacks under the hub's name of the module."""
    folder = write_checkpoint(tmp_path / "checkpoint", "fused")
    tensors = load_file(folder / SINGLE)
    renamed = {
        name.replace("mlp.router", "mlp.gate").replace("mlp.experts", "block_sparse_moe.experts"): t
        for name, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / SINGLE)
    expected = dict(make_model(BASE).named_parameters())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read(folder).items())


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", **SHAPES["tied"])
    expected = read(folder)
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / SINGLE)
    assert "lm_head.weight" not in expected
    assert read(folder).keys() == expected.keys()


def test_stored_rope_frequencies_are_ignored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / SINGLE)
    assert check(folder).keys() == dict(make_model(BASE).named_parameters()).keys()


def test_headers_say_where_each_tensor_lies(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3, dtype=torch.bfloat16)
    stored = read_headers(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert {name: where.file.name for name, where in stored.items()} == weight_map
    assert stored["lm_head.weight"].shape == (2048, 64)
    assert stored["lm_head.weight"].dtype == "BF16"


def change(tensors: Tensors, name: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> Tensors:
    changed = {key: tensor if key != name else how(tensor) for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in changed.items() if tensor is not None}


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
FUSED = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("writer", "name", "how", "words"),
    [
        ("hub", EXPERT, lambda t: None, [EXPERT, "lacks"]),
        ("hub", "model.norm.bias", lambda t: None, ["model.norm.bias", "lacks"]),
        ("hub", "lm_head.weight", lambda t: None, ["lm_head.weight", "lacks"]),
        ("hub", "lm_head.bias", lambda t: None, ["lm_head.bias", "lacks"]),
        (
            "hub",
            "model.layers.0.self_attn.o_proj.bias",
            lambda t: None,
            ["model.layers.0.self_attn.o_proj.bias", "lacks"],
        ),
        (
            "hub",
            "model.layers.0.block_sparse_moe.gate.weight",
            lambda t: None,
            ["model.layers.0.block_sparse_moe.gate.weight", "lacks"],
        ),
        ("fused", FUSED, lambda t: None, [FUSED, "lacks"]),
        ("hub", EXPERT, lambda t: t.T, [SINGLE, EXPERT, "[64, 96]", "[96, 64]"]),
        ("hub", K_PROJ, lambda t: t[:16], [SINGLE, K_PROJ, "[16, 64]", "[32, 64]"]),
        (
            "hub",
            "model.embed_tokens.weight",
            lambda t: t[:-1],
            [SINGLE, "model.embed_tokens.weight", "[2047, 64]", "[2048, 64]"],
        ),
        ("fused", FUSED, lambda t: t[:-1], [SINGLE, FUSED, "[15, 64, 96]", "[16, 64, 96]"]),
        ("hub", K_PROJ, lambda t: t.to(torch.float64), [SINGLE, K_PROJ, "F64", "BF16"]),
        ("hub", EXPERT, lambda t: t.to(torch.float8_e4m3fn), [SINGLE, EXPERT, "F8_E4M3", f"{EXPERT}_scale_inv"]),
        ("fused", FUSED, lambda t: t.to(torch.int8), [SINGLE, FUSED, "I8"]),
    ],
)
def test_a_tensor_that_is_wrong_is_named(
    tmp_path: Path, writer: str, name: str, how: Callable[[torch.Tensor], torch.Tensor | None], words: list[str]
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", writer)
    tensors = load_file(folder / SINGLE)
    assert name in tensors
    save_file({key: tensor.contiguous() for key, tensor in change(tensors, name, how).items()}, folder / SINGLE)
    assert_error(folder, words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lm_head_bias": False}, [SINGLE, "lm_head.bias", "1 such", "lm_head_bias"]),
        ({"attention_bias": False}, [SINGLE, "self_attn.k_proj.bias", "8 such", "attention_bias"]),
        ({"num_hidden_layers": 1}, [SINGLE, "model.layers.1.", "num_hidden_layers"]),
    ],
)
def test_tensors_that_the_config_has_no_place_for(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "config.json").write_text(json.dumps(BASE | config))
    assert_error(folder, words)


def test_experts_that_the_config_has_no_place_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(folder / SINGLE)
    tensors = {name: tensor[:5].clone() if name.endswith("gate.weight") else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(BASE | {"num_local_experts": 5}))
    assert_error(folder, [SINGLE, "block_sparse_moe.experts.10.w1.weight", "66 such", "num_local_experts"])


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def header(folder: Path, entry: object) -> None:
    """Writes a shard whose header holds one entry and whose data are 16 bytes."""
    text = json.dumps({"lm_head.bias": entry}).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / SHARD).unlink(), [SHARD, "missing"]),
        (
            lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]),
            [SHARD, "truncated", "1 bytes past its end"],
        ),
        (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:100]), [SHARD, "truncated"]),
        (lambda f: (f / SHARD).write_bytes(b""), [SHARD, "truncated"]),
        (lambda f: (f / SHARD).write_bytes(b"1234567"), [SHARD, "truncated"]),
        (lambda f: (f / SHARD).write_text(POINTER), [SHARD, "Git LFS pointer"]),
        (lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 8) + b"\xff" * 64), [SHARD, "no readable safetensors"]),
        (lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 3) + b"[1]"), [SHARD, "no safetensors"]),
        (lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 1 << 63) + b"{}"), [SHARD, "truncated"]),
        (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), [SHARD, "no readable safetensors"]),
        (lambda f: header(f, 5), [SHARD, "lm_head.bias", "damaged"]),
        (lambda f: header(f, {"dtype": "F32", "shape": [4]}), [SHARD, "lm_head.bias", "damaged"]),
        (
            lambda f: header(f, {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}),
            [SHARD, "lm_head.bias", "damaged"],
        ),
        (
            lambda f: header(f, {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}),
            [SHARD, "lm_head.bias", "damaged"],
        ),
        (
            lambda f: header(f, {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}),
            [SHARD, "lm_head.bias", "truncated"],
        ),
        (
            lambda f: header(f, {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}),
            [SHARD, "lm_head.bias", "8 bytes", "F32 [4]"],
        ),
        (
            lambda f: header(f, {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}),
            [SHARD, "lm_head.bias", "damaged"],
        ),
        (
            lambda f: header(f, {"dtype": 5, "shape": [4], "data_offsets": [0, 16]}),
            [SHARD, "lm_head.bias", "damaged"],
        ),
        (
            lambda f: header(f, {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}),
            [SHARD, "4 bytes behind its last tensor"],
        ),
        (
            lambda f: header(f, {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}),
            [SHARD, "overlap or leave bytes between them, at byte 4"],
        ),
        (
            lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 27) + b'{"__metadata__":{"a":1.5}} '),
            [SHARD, "__metadata__"],
        ),
        (
            lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 19) + b'{"__metadata__":[]}'),
            [SHARD, "__metadata__"],
        ),
        (lambda f: edit_index(f, lambda m: m.update({"lm_head.bias": "x" * 300})), [INDEX, "weight_map"]),
        (lambda f: edit_index(f, lambda m: m.update({"model.absent": SHARD})), [SHARD, "model.absent", INDEX]),
        (
            lambda f: edit_index(f, lambda m: m.update({"lm_head.bias": "absent.safetensors"})),
            ["absent.safetensors", "missing"],
        ),
        (lambda f: edit_index(f, lambda m: m.update({"lm_head.bias": 5})), [INDEX, "weight_map"]),
        (lambda f: edit_index(f, lambda m: m.pop("lm_head.bias")), ["lm_head.bias", "lacks"]),
        (lambda f: (f / INDEX).write_text("{}"), [INDEX, "weight_map"]),
        (lambda f: (f / INDEX).write_text("{"), [INDEX, "not JSON"]),
        (lambda f: (f / INDEX).write_text(POINTER), [INDEX, "Git LFS pointer"]),
        (lambda f: [file.unlink() for file in f.glob("*.safetensors*")], [INDEX, SINGLE, "safetensors"]),
        (lambda f: [file.unlink() for file in f.glob("*.safetensors")], [INDEX, "names 3", "none of them is here"]),
        (lambda f: (f / INDEX).unlink(), ["model-00001-of-00003.safetensors, 3 such", f"but no {INDEX}"]),
        (
            lambda f: [*(file.unlink() for file in f.glob("*.safet*")), (f / "pytorch_model.bin").touch()],
            ["pytorch_model.bin is here", "save_pretrained"],
        ),
        (lambda f: (f / SINGLE).symlink_to("/dev/zero"), [SINGLE, "no regular file"]),
        (lambda f: ((f / SHARD).unlink(), os.mkfifo(f / SHARD)), [SHARD, "no regular file"]),
        (lambda f: ((f / INDEX).unlink(), os.mkfifo(f / INDEX)), [INDEX, "no regular file"]),
        (
            lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 10**6) + b'{"a":' * 200_000),
            [SHARD, "no readable safetensors"],
        ),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3)
    assert check(folder)
    damage(folder)
    assert_error(folder, words)


def test_the_only_file_goes_before_an_index(tmp_path: Path) -> None:
    """As transformers has it: the index may be that of an older save."""
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3, seed=1)
    old = read(folder)
    write_checkpoint(folder, seed=2)
    assert (folder / INDEX).exists()
    expected = dict(make_model(BASE, seed=2).named_parameters())
    found = read(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not torch.equal(found["lm_head.weight"], old["lm_head.weight"])


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._orig_mod."),
    ],
)
def test_what_wrapped_the_model_is_stripped(tmp_path: Path, rename: Callable[[str], str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    save_file({rename(name): tensor for name, tensor in load_file(folder / SINGLE).items()}, folder / SINGLE)
    expected = dict(make_model(BASE).named_parameters())
    found = read(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"{Q_PROJ}.qweight", f"{Q_PROJ}.qzeros", f"{Q_PROJ}.scales", f"{Q_PROJ}.g_idx"], ["quantised (GPTQ)"]),
        ([f"{Q_PROJ}.qweight", f"{Q_PROJ}.qzeros", f"{Q_PROJ}.scales"], ["quantised (AWQ or GPTQ)"]),
        ([f"{Q_PROJ}.weight.absmax", f"{Q_PROJ}.weight.quant_map"], ["quantised (bitsandbytes)"]),
        ([f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"], ["quantised (bitsandbytes)"]),
        ([f"{Q_PROJ}.SCB"], ["quantised (bitsandbytes)"]),
        ([f"{Q_PROJ}.weight_packed", f"{Q_PROJ}.weight_shape"], ["quantised (compressed-tensors)"]),
        ([f"{Q_PROJ}.lora_A.default.weight"], ["not merged", "merge_and_unload"]),
        ([f"base_model.model.{Q_PROJ}.base_layer.weight"], ["not merged", "merge_and_unload"]),
        ([f"module.{Q_PROJ}.weight"], [f"{Q_PROJ}.weight and module.{Q_PROJ}.weight", "the same tensor"]),
    ],
)
def test_names_that_say_what_was_done_to_the_weights(tmp_path: Path, names: list[str], words: list[str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    save_file(load_file(folder / SINGLE) | {name: torch.ones(1) for name in names}, folder / SINGLE)
    assert_error(folder, words)


@pytest.mark.parametrize(
    ("scales", "suffix"),
    [("tensor", "_scale"), ("rows", "_scale"), ("blocks", "_scale_inv"), ("small blocks", "_scale_inv")],
)
@pytest.mark.parametrize("writer", ["hub", "fused"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_the_numbers_that_it_stands_for(
    tmp_path: Path, writer: str, scales: str, suffix: str, dtype: torch.dtype
) -> None:
    """In blocks of 64 rows and 32 columns the halves of a fused gate_up_proj, of 96 rows, end inside a block."""
    block = (64, 32) if scales == "small blocks" else (128, 128)
    folder = write_checkpoint(tmp_path / "checkpoint", writer, intermediate_size=96)
    stored: Tensors = {}
    plain: Tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in load_file(folder / SINGLE).items():
        plain[name] = stored[name] = tensor
        if ("proj" not in name and ".experts." not in name) or tensor.ndim < 2:
            continue
        *outer, n, k = tensor.shape
        rows, columns = {"tensor": (n, k), "rows": (1, k)}.get(scales, block)
        grid = torch.rand(*outer, -(-n // rows), -(-k // columns), generator=generator) + 0.5
        codes = (tensor * 8).to(dtype)
        spread = grid.repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(columns, -1)[..., :k]
        stored[name], stored[name + suffix] = codes, grid
        if scales == "tensor" and not outer:
            stored[name + suffix] = grid.reshape(())
        stored[name.removesuffix(".weight") + ".input_scale"] = torch.ones(())
        plain[name] = codes.float() * spread
    save_file(stored, folder / SINGLE)
    config = BASE | {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    (folder / "config.json").write_text(json.dumps(config))
    found = read(folder)
    other = write_checkpoint(tmp_path / "plain", writer)
    save_file(plain, other / SINGLE)
    expected = read(other)
    assert any(name.endswith("q_proj.weight") for name in expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (torch.ones(3), ["_scale_inv", "F32 [3]", "one for each row or one for [128, 128]"]),
        (torch.ones(1, dtype=torch.int32), ["_scale_inv", "I32 [1]"]),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path: Path, scales: torch.Tensor, words: list[str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(folder / SINGLE)
    name = f"{Q_PROJ}.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}, folder / SINGLE)
    assert_error(folder, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("writer", "name"), [("hub", EXPERT), ("fused", FUSED), ("hub", K_PROJ)])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, writer: str, name: str, dtype: torch.dtype, value: float
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", writer, dtype=dtype)
    tensors = load_file(folder / SINGLE)
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=f"{SINGLE}: {re.escape(name)} holds numbers that are not finite"):
        read(folder)


def test_an_adapter_is_no_checkpoint_and_none_lies_beside_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(CheckpointError, match="an adapter lies beside the weights"):
        source.resolve(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is an adapter of owner/base and no model"):
        source.resolve(folder)


def test_a_shard_that_is_cut_after_its_header_was_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    rows = check(folder)["lm_head.weight"]
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lm_head\.weight cannot be read"):
        read_rows(rows)


def assert_error(folder: Path, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        check(folder)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
