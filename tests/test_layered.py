"""Layer by layer: bit for bit the numbers of the whole model, whatever the shape, the weights and the text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phimoe_onnx import export, layered, reference
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.adapter import read_adapter
from phimoe_onnx.checkpoint.tensors import SINGLE, parameters, read_headers
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import BundleError, PhiMoEError
from phimoe_onnx.layered import Ran, Read, Text
from phimoe_onnx.parity.stored import stored_attention, stored_model, stored_weights
from phimoe_onnx.scratch import Scratch
from tests.checkpoints import BASE, MODEL, SHAPES, random_ids, write_checkpoint
from tests.test_adapter import EXPERT, Q_PROJ, factors, write_adapter

Make = Callable[..., Path]
LENGTHS = (1, 5, 31, 32, 33, 70, 128)  # on both sides of the rope boundary of 32, and of every window
TEXTS = [Text(random_ids(length)) for length in LENGTHS]


def weights(checkpoint: Path, task: str = "text-generation", adapter: Path | None = None) -> Read:
    config = read_config(checkpoint)
    merged = None if adapter is None else read_adapter(adapter)
    return layered.checkpoint_weights(config, parameters(config, read_headers(checkpoint), task, merged))


def run(
    checkpoint: Path, task: str = "text-generation", adapter: Path | None = None
) -> tuple[list[Ran], list[np.ndarray]]:
    """What becomes of TEXTS, and their outputs."""
    config, read = read_config(checkpoint), weights(checkpoint, task, adapter)
    ran = layered.run(config, read, TEXTS)
    head = layered.head(config, task, read)
    with torch.inference_mode():
        return ran, [head(each.hidden).numpy() for each in ran]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_routing_are_the_whole_models(checkpoint: Make, shape: str) -> None:
    model = reference.load_reference(checkpoint(shape))
    ran, outputs = run(checkpoint(shape))
    for text, each, output in zip(TEXTS, ran, outputs, strict=True):
        recording, routing = reference.recorded(model)
        assert np.array_equal(output, reference.logits(recording, text.token_ids)), len(text.token_ids)
        assert all(torch.equal(a, b) for a, b in zip(each.routing, routing, strict=True))


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
@pytest.mark.parametrize("shape", ["longrope-window", "tied", "no-bias"])
def test_other_tasks_are_the_whole_models(checkpoint: Make, shape: str, task: str) -> None:
    model = reference.load_reference(checkpoint(shape, task))
    _, outputs = run(checkpoint(shape, task), task)
    for text, output in zip(TEXTS, outputs, strict=True):
        assert np.array_equal(output[0], reference.last(model, text.token_ids))


def test_the_small_model() -> None:
    """Past its boundary of 256 tokens, in bf16 and two shards."""
    ids = random_ids(300)
    config, read, model = read_config(MODEL), weights(MODEL), reference.load_reference(MODEL)
    ran = layered.run(config, read, [Text(ids), Text(ids[:256])])
    with torch.inference_mode():
        outputs = [layered.head(config, "text-generation", read)(each.hidden).numpy() for each in ran]
    assert np.array_equal(outputs[0], reference.logits(model, ids))
    assert np.array_equal(outputs[1], reference.logits(model, ids[:256]))
    assert not np.allclose(outputs[0][:256], outputs[1], atol=0.1)  # by other factors


def test_an_adapter(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=torch.bfloat16)
    tensors = factors(Q_PROJ, 64, 64) | factors(EXPERT, 96, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    model = reference.load_reference(checkpoint, adapter=adapter)
    _, outputs = run(checkpoint, adapter=adapter)
    assert all(
        np.array_equal(output, reference.logits(model, text.token_ids))
        for text, output in zip(TEXTS, outputs, strict=True)
    )
    assert not np.array_equal(outputs[-1], run(checkpoint)[1][-1])


@pytest.mark.parametrize("writer", ["hub", "fused"])
def test_fp8(tmp_path: Path, writer: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", writer)
    stored = {}
    for name, tensor in load_file(checkpoint / SINGLE).items():
        stored[name] = tensor
        if ".experts." in name or "_proj.weight" in name:
            stored[name], stored[f"{name}_scale"] = tensor.mul(64).to(torch.float8_e4m3fn), torch.tensor([1 / 60])
    save_file(stored, checkpoint / SINGLE)
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}},
    }
    (checkpoint / "config.json").write_text(json.dumps(BASE | {"quantization_config": quantization}))
    model = reference.load_reference(checkpoint)
    _, outputs = run(checkpoint)
    assert np.array_equal(outputs[-1], reference.logits(model, TEXTS[-1].token_ids))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("tiles", {"quantize": "int8", "kv_cache": "int4"}),
        ("tiles", {"quantize": "fp16"}),
        ("tiles", {"quantize": "int4", "target": "cuda"}),
        ("tiles", {"quantize": "int4", "store": {"*experts.down_proj.3": "int8", "lm_head.weight": "fp16"}}),
        ("tied", {"quantize": "int4", "kv_cache": "int8", "operators": "stock"}),
        ("tied", {"quantize": "int4", "kv_cache": "fp16", "operators": "native"}),
    ],
)
def test_the_stored_weights_are_the_whole_models(
    tmp_path: Path, checkpoint: Make, shape: str, options: dict[str, str]
) -> None:
    """With the bundle's rounding of keys and values, the routing its own and that of the unrounded model."""
    folder = export(checkpoint(shape), tmp_path / "bundle", **options)
    config, read, manifest = read_config(checkpoint(shape)), weights(checkpoint(shape)), read_manifest(folder)
    exact = layered.run(config, read, TEXTS)
    read = stored_weights(read, folder, manifest, config)
    texts = [*TEXTS, *(Text(text.token_ids, each.routing) for text, each in zip(TEXTS, exact, strict=True))]
    ran = layered.run(config, read, texts, attention=stored_attention(folder, manifest))
    head = layered.head(config, "text-generation", read)
    model = stored_model(reference.load_reference(checkpoint(shape)), folder, manifest)
    moved = []
    for text, each in zip(texts, ran, strict=True):
        whole = model if text.routing is None else reference.replayed(model, text.routing)
        with torch.inference_mode():
            assert np.array_equal(head(each.hidden).numpy(), reference.logits(whole, text.token_ids))
        moved += [not torch.equal(a, b) for a, b in zip(each.routing, text.routing or [], strict=False)]
    assert moved == [False] * len(TEXTS) * config.num_hidden_layers


def test_only_the_chosen_experts_are_read_each_once(checkpoint: Make) -> None:
    config, read, seen = read_config(checkpoint("experts")), weights(checkpoint("experts")), []

    def counting(name: str, expert: int | None) -> torch.Tensor:
        seen.append((name, expert))
        return read(name, expert)

    (ran,) = layered.run(config, counting, [Text(random_ids(2))])
    kinds = ("gate_up_proj", "down_proj")
    chosen = [sorted(set(routing.flatten().tolist())) for routing in ran.routing]
    assert [(name, expert) for name, expert in seen if expert is not None] == [
        (f"model.layers.{layer}.block_sparse_moe.experts.{kind}", expert)
        for layer, experts in enumerate(chosen)
        for expert, kind in itertools.product(experts, kinds)
    ]
    assert any(len(experts) < 5 for experts in chosen)
    assert len(seen) == len(set(seen))


def test_a_long_text_attends_in_pieces(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = checkpoint("longrope-window")
    _, expected = run(shape)
    monkeypatch.setattr(layered, "CHUNK", 13)
    _, outputs = run(shape)
    for one, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_hidden_states_on_disk_are_the_same(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, read = read_config(checkpoint("plain")), weights(checkpoint("plain"))
    expected = layered.run(config, read, TEXTS)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch = Scratch(limit=40_000)
    ran = layered.run(config, read, TEXTS, scratch=scratch)
    assert all(torch.equal(one.hidden, other.hidden) for one, other in zip(ran, expected, strict=True))
    assert isinstance(scratch.empty(100, 200), np.memmap)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PhiMoEError, match=r"has no room for \d+\.\d\d GB of intermediate results .*set TMPDIR"):
        Scratch(limit=0).empty(1 << 31, 1 << 20)


def test_agreement() -> None:
    one, other = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[1, 2], [4, 3]]])
    assert layered.agreement([one, one], [one, other]) == 0.75


def test_a_graph_without_its_weights_is_named(tmp_path: Path, checkpoint: Make) -> None:
    folder = export(checkpoint("plain"), tmp_path / "bundle", quantize="int4", operators="stock")
    other = export(checkpoint("plain"), tmp_path / "other")
    config = read_config(folder)
    read = stored_weights(weights(checkpoint("plain")), other, read_manifest(folder), config)
    with pytest.raises(BundleError, match=r"the graph has no .*codes, but the manifest says int4"):
        read("lm_head.weight", None)
