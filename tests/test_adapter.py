"""LoRA adapters: what a merge gives, and what is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phimoe_onnx import export
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.adapter import CONFIG, WEIGHTS, read_adapter
from phimoe_onnx.checkpoint.data import read_rows
from phimoe_onnx.checkpoint.tensors import SINGLE, parameters, read_headers
from phimoe_onnx.cli.export import main as export_main
from phimoe_onnx.cli.verify import main as verify_main
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import CheckpointError, PhiMoEError
from phimoe_onnx.exporter import pipeline
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.reference import load_reference
from tests.checkpoints import write_checkpoint

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_local_experts": 3}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "owner/base"}
Q_PROJ = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3"


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(LORA | config))
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def factors(module: str, n: int, k: int, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, k, generator=generator) * 0.1,
        f"{module}.lora_B.weight": torch.randn(n, rank, generator=generator) * 0.1,
    }


def read(checkpoint: Path, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    rows = parameters(
        read_config(checkpoint),
        read_headers(checkpoint),
        adapter=None if adapter is None else read_adapter(adapter),
    )
    return {name: read_rows(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("writer", ["hub", "fused"])
def test_what_is_added(tmp_path: Path, writer: str, dtype: torch.dtype) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", writer, dtype=dtype, **SMALL)
    tensors = factors(Q_PROJ, 64, 64) | factors(EXPERT, 96, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    before, after = read(checkpoint), read(checkpoint, adapter)

    def merged(module: str, base: torch.Tensor) -> torch.Tensor:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        return (base + b @ a * 1.5).to(dtype).float()

    stack = "model.layers.1.block_sparse_moe.experts.gate_up_proj"
    up = slice(5 * 96, 6 * 96)  # behind gate and up of two experts, and its own gate
    expected = {name: tensor.clone() for name, tensor in before.items()}
    expected[f"{Q_PROJ}.weight"] = merged(Q_PROJ, before[f"{Q_PROJ}.weight"])
    expected[stack][up] = merged(EXPERT, before[stack][up])
    assert not torch.equal(expected[stack], before[stack])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())


def test_a_bundle_with_an_adapter_is_that_of_the_merged_weights(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    saved = {"lm_head.weight": torch.randn(2048, 64), "lm_head.bias": torch.randn(2048)}
    adapter = write_adapter(tmp_path / "adapter", factors(EXPERT, 96, 64) | saved, modules_to_save=["lm_head"])
    tensors = load_file(checkpoint / SINGLE)
    a, b = factors(EXPERT, 96, 64).values()
    tensors[f"{EXPERT}.weight"] += b @ a * 1.5
    plain = write_checkpoint(tmp_path / "plain", **SMALL)
    save_file(tensors | saved, plain / SINGLE)
    merged = export(checkpoint, tmp_path / "merged", quantize="int4", adapter=adapter)
    expected = export(plain, tmp_path / "expected", quantize="int4")
    for file in (path.name for path in expected.iterdir() if path.suffix in (".data", ".onnx")):
        assert (merged / file).read_bytes() == (expected / file).read_bytes(), file
    assert read_manifest(merged).source == "checkpoint with adapter"
    one, other = load_reference(checkpoint, adapter=adapter), load_reference(plain)
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name


def test_a_bundle_is_held_against_the_checkpoint_with_its_adapter(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    adapter = write_adapter(tmp_path / "adapter", factors(Q_PROJ, 64, 64))
    bundle = tmp_path / "bundle"
    assert export_main([str(checkpoint), "-o", str(bundle), "--adapter", str(adapter)]) == 0
    arguments = [str(bundle), "--reference", str(checkpoint), "--tokens", "60", "--new-tokens", "2"]
    assert verify_main([*arguments, "--adapter", str(adapter)]) == 0
    assert verify_main(arguments) == 1


def test_a_resumed_export_does_not_mix_two_adapters(tmp_path: Path) -> None:
    """The journal of an export with one adapter counts for nothing with another."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    one = write_adapter(tmp_path / "one", factors(Q_PROJ, 64, 64))
    other = write_adapter(tmp_path / "other", factors(Q_PROJ, 64, 64), lora_alpha=60)
    plans = [
        pipeline._plan(tmp_path, [], recipe_for(read_config(checkpoint), TARGETS["cpu"], "none"), files)
        for files in ([], read_adapter(one).files, read_adapter(other).files)
    ]
    assert len(set(plans)) == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, [CONFIG, "peft_type", "'IA3'", "'LORA'"]),
        ({"use_dora": True}, [CONFIG, "use_dora", "True", "merge_and_unload"]),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, [CONFIG, "target_parameters", "gate_up_proj"]),
        ({"lora_bias": True}, [CONFIG, "lora_bias"]),
        ({"bias": "lora_only"}, [CONFIG, "bias", "'lora_only'", "'none'"]),
        ({"init_lora_weights": "pissa"}, [CONFIG, "init_lora_weights", "'pissa'"]),
        ({"fan_in_fan_out": True}, [CONFIG, "fan_in_fan_out"]),
        ({"layer_replication": [[0, 2]]}, [CONFIG, "layer_replication"]),
        ({"trainable_token_indices": [1]}, [CONFIG, "trainable_token_indices"]),
        ({"something_of_tomorrow": {"a": 1}}, [CONFIG, "something_of_tomorrow"]),
        ({"r": 8}, [WEIGHTS, Q_PROJ, "rank 8"]),
        ({"r": 0}, [CONFIG, "r is 0", "positive"]),
        ({"lora_alpha": "x"}, [CONFIG, "lora_alpha", "'x'", "positive"]),
        ({"rank_pattern": {"q_proj": 10**400}}, [CONFIG, "rank_pattern", "positive"]),
        ({"rank_pattern": {"(": 2}}, [CONFIG, "rank_pattern", "pattern that cannot be read"]),
        ({"alpha_pattern": [1]}, [CONFIG, "alpha_pattern", "[1]", "object"]),
    ],
)
def test_a_config_that_is_not_merged_is_refused(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(Q_PROJ, 64, 64), **config)
    with pytest.raises(PhiMoEError) as error:
        read_adapter(adapter)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (factors("model.layers.7.self_attn.q_proj", 64, 64), ["model.layers.7.self_attn.q_proj.weight (1 such)"]),
        (factors(Q_PROJ, 128, 64), [Q_PROJ, "[128, 64]", "[64, 64]"]),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64)}, [f"{Q_PROJ}.lora_A.weight", "other factor"]),
        ({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(64)}, ["lora_magnitude_vector", "not merged"]),
        ({"lm_head.weight": torch.ones(7, 64)}, ["lm_head.weight", "[7, 64]", "[2048, 64]"]),
        ({"lm_head.weight": torch.ones(2048, 64, dtype=torch.int8)}, ["lm_head.weight", "'I8'", "F32, F16, BF16"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], words: list[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError) as error:
        read(checkpoint, adapter)
    assert all(word in str(error.value) for word in [WEIGHTS, *words]), error.value


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL)
    tensors = factors(Q_PROJ, 64, 64)
    tensors[f"{Q_PROJ}.lora_B.weight"][3, 1] = float("nan")
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: base_model\.model\.{Q_PROJ}\.lora_B\.weight holds"):
        export(checkpoint, tmp_path / "bundle", adapter=adapter)
    assert not (tmp_path / "bundle").exists()


def test_tied_weights_are_not_merged(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALL, tie_word_embeddings=True, lm_head_bias=False)
    adapter = write_adapter(tmp_path / "adapter", factors("lm_head", 2048, 64))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        read(checkpoint, adapter)


def test_an_adapter_without_weights(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {})
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: no such file"):
        read_adapter(adapter)
    with pytest.raises(PhiMoEError, match=f"{CONFIG}: no such file"):
        read_adapter(tmp_path)
