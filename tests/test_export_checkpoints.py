"""What becomes of unusual checkpoints in an export, and what is found there before and while weights are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phimoe_onnx import export
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.tensors import SINGLE
from phimoe_onnx.errors import CheckpointError, ConfigError, PhiMoEError
from tests.checkpoints import BASE, MODEL, write_checkpoint

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "num_local_experts": 2}


def data(bundle: Path) -> dict[str, bytes]:
    """The bundle's graphs and weights by file name."""
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.suffix in (".data", ".onnx")}


def test_grin_moe_gives_the_bundle_of_a_phimoe(tmp_path: Path) -> None:
    names = {"model_type": "grinmoe", "architectures": ["GRIN-MoE"], "auto_map": {"AutoConfig": "x.Y"}}
    grin, phimoe = write_checkpoint(tmp_path / "grin", **SMALL, **names), write_checkpoint(tmp_path / "phi", **SMALL)
    bundle, expected = export(grin, tmp_path / "a"), export(phimoe, tmp_path / "b")
    assert data(bundle) == data(expected)
    manifest = read_manifest(bundle)
    assert manifest.task == "text-generation"
    assert json.loads((bundle / "config.json").read_text()) == BASE | SMALL | names | {
        "model_type": "phimoe",
        "architectures": ["PhimoeForCausalLM"],
    }
    assert (expected / "config.json").read_bytes() == (phimoe / "config.json").read_bytes()


def test_fp8_gives_the_bundle_of_its_numbers(tmp_path: Path) -> None:
    fp8, plain = (write_checkpoint(tmp_path / name, **SMALL) for name in ("fp8", "plain"))
    stored, numbers = {}, {}
    for name, tensor in load_file(fp8 / SINGLE).items():
        stored[name] = numbers[name] = tensor
        if ".experts." in name or "_proj.weight" in name:
            stored[name], scale = tensor.mul(64).to(torch.float8_e4m3fn), torch.tensor([1 / 60])
            stored[f"{name}_scale"] = scale
            numbers[name] = stored[name].float() * scale
    save_file(stored, fp8 / SINGLE)
    save_file(numbers, plain / SINGLE)
    (fp8 / "config.json").write_text(
        json.dumps(BASE | SMALL | {"quantization_config": {"quant_method": "compressed-tensors", **FLOAT_8}})
    )
    bundle, expected = export(fp8, tmp_path / "a", quantize="int4"), export(plain, tmp_path / "b", quantize="int4")
    assert data(bundle) == data(expected)
    assert json.loads((bundle / "config.json").read_text()) == BASE | SMALL


FLOAT_8 = {"config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}}}
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
STACK = "model.layers.0.block_sparse_moe.experts.down_proj, expert 1,"


@pytest.mark.parametrize(
    ("name", "value", "options", "words"),
    [
        (EXPERT, float("nan"), {}, [SINGLE, EXPERT, "not finite"]),
        (Q_PROJ, float("inf"), {"quantize": "int4"}, [SINGLE, Q_PROJ, "not finite"]),
        ("model.norm.bias", float("nan"), {"quantize": "int4"}, [SINGLE, "model.norm.bias", "not finite"]),
        (EXPERT, 7e4, {"quantize": "fp16"}, [STACK, "7e+04", "too large for float16", "6.55e+04"]),
        (Q_PROJ, -7e4, {"quantize": "fp16"}, [Q_PROJ, "7e+04", "too large for float16"]),
        ("lm_head.weight", 7e4, {"target": "cuda"}, ["lm_head.weight", "7e+04", "too large for float16"]),
        (Q_PROJ, 1e6, {"target": "cuda", "quantize": "int4"}, [Q_PROJ, "1e+06", "too large for float16"]),
    ],
)
def test_numbers_that_cannot_be_stored_are_named(
    tmp_path: Path, name: str, value: float, options: dict[str, str], words: list[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL, intermediate_size=128)
    tensors = load_file(checkpoint / SINGLE)
    tensors[name].view(-1)[3] = value
    save_file(tensors, checkpoint / SINGLE)
    with pytest.raises(CheckpointError) as error:
        export(checkpoint, tmp_path / "bundle", **options)
    assert all(word in str(error.value) for word in words), error.value
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == ["checkpoint"]


def test_the_largest_float16_is_stored(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    tensors = load_file(checkpoint / SINGLE)
    tensors[EXPERT].view(-1)[3] = 65504
    save_file(tensors, checkpoint / SINGLE)
    assert export(checkpoint, tmp_path / "bundle", quantize="fp16").is_dir()


def more_tokens(folder: Path) -> None:
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    extra = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": 2048 + n, "content": f"<|extra{n}|>"} | extra for n in range(5)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def generation(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            more_tokens,
            ["tokenizer.json", "'<|extra0|>' (2048), '<|extra1|>' (2049), '<|extra2|>' (2050) and 2 more", "2048"],
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["tokenizer.json", "cannot be read"]),
        (generation(eos_token_id=[7, 2048]), ["generation_config.json", "eos_token_id", "2048", "vocab_size is 2048"]),
        (generation(bos_token_id=[1]), ["generation_config.json", "bos_token_id", "[1]", "one token id or null"]),
        (generation(bos_token_id=9999), ["generation_config.json", "bos_token_id", "9999", "vocab_size is 2048"]),
        (generation(pad_token_id=-1), ["generation_config.json", "pad_token_id", "-1", "token id"]),
        (generation(pad_token_id=0.5), ["generation_config.json", "pad_token_id", "0.5", "token id"]),
        (generation(pad_token_id="</s>"), ["generation_config.json", "pad_token_id", "'</s>'", "token id"]),
        (generation(eos_token_id=10**300), ["generation_config.json", "eos_token_id", "1000"]),
    ],
)
def test_tokens_without_rows_are_named(
    tmp_path: Path, damage: Callable[[Path], object], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    damage(checkpoint)
    monkeypatch.setattr("phimoe_onnx.exporter.pipeline.trace", None)  # found before the work begins
    with pytest.raises(ConfigError) as error:
        export(checkpoint, tmp_path / "bundle")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("config", [{"num_labels": 10**9}, {"max_position_embeddings": 10**8}, {"vocab_size": 2**63}])
def test_numbers_at_the_edges_cost_nothing(tmp_path: Path, config: dict[str, int]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    (checkpoint / "config.json").write_text(json.dumps(BASE | SMALL | config))
    with pytest.raises(PhiMoEError, match=str(next(iter(config.values())))):
        export(checkpoint, tmp_path / "bundle")
