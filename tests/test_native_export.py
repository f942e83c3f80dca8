"""Bundles of native operators: the same model as a stock bundle of the same rounding, and right in every use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from phimoe_onnx import PhiMoE, convert, export, operators, verify
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.cli.export import main
from phimoe_onnx.errors import DeviceError, ExportError
from phimoe_onnx.parity.stored import stored_model
from phimoe_onnx.parity.thresholds import Thresholds
from phimoe_onnx.reference import load_reference
from phimoe_onnx.runtime.ort import session
from tests.checkpoints import MODEL, random_ids

Checkpoint = Callable[..., Path]
LOOSE = Thresholds(kl=0.5, kernel_kl=0.1, perplexity_ratio=1.2)  # a random model's logits say little
built = pytest.mark.skipif(operators.library() is None, reason="the library of the native operators is not built here")


@pytest.mark.parametrize(
    ("shape", "store"),
    [
        ("longrope-window", {}),
        ("tied", {"*.down_proj": "int8"}),
        ("head_dim", {"lm_head.weight": "int8", "*self_attn*": "int8"}),
    ],
)
def test_native_and_stock_are_one_model(
    tmp_path: Path, checkpoint: Checkpoint, shape: str, store: dict[str, str]
) -> None:
    """Every number that they stand for is the same."""
    source = checkpoint(shape)
    folders = [
        export(source, tmp_path / kind, quantize="int4", store=store, operators=kind) for kind in ("native", "stock")
    ]
    reference = load_reference(source)
    native, stock = (stored_model(reference, folder, read_manifest(folder)).state_dict() for folder in folders)
    assert native.keys() == stock.keys()
    for name in native:
        assert np.array_equal(native[name], stock[name]), name
    changed = [name for name, tensor in reference.state_dict().items() if not np.array_equal(tensor, native[name])]
    assert any("gate_up_proj" in name for name in changed)
    assert not any("norm" in name or ".gate." in name for name in changed)


def test_the_manifest_says_what_a_reader_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle"
    assert main([str(MODEL), "-o", str(folder), "--quantize", "int4", "--operators", "native"]) == 0
    out = capsys.readouterr().out
    assert "int4 in strips" in out
    assert out.splitlines()[-1].startswith("native operators: ")
    assert "--operators stock" in out.splitlines()[-1]
    manifest = read_manifest(folder)
    assert [graph.file for graph in manifest.graphs] == ["model.onnx", "model.plain.onnx"]
    assert {graph.requires for graph in manifest.graphs} == {("phimoe.native.1",)}
    assert not (folder / "genai_config.json").exists()  # onnxruntime-genai cannot open it
    data = sum(path.stat().st_size for path in folder.glob("*.data"))
    assert data < 3_300_000  # 4.74 M weights, the small ones float32


def test_without_the_library_one_sentence_says_what_to_do(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(checkpoint("plain"), tmp_path / "bundle", quantize="int4", operators="native")
    monkeypatch.setattr(session, "PROVIDED", frozenset())
    with pytest.raises(DeviceError, match=r"native operators.*--operators stock"):
        PhiMoE.load(folder)


@built
@pytest.mark.parametrize("shape", ["longrope-window", "tied", "head_dim", "no-bias", "experts"])
@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_parity_in_every_shape(tmp_path: Path, checkpoint: Checkpoint, shape: str, quantize: str) -> None:
    source = checkpoint(shape)
    folder = export(source, tmp_path / "bundle", quantize=quantize, operators="native")
    report = verify(folder, source, tokens=150, new_tokens=8, thresholds=LOOSE)
    assert report.failures == []
    assert report.bundle_to_stored is not None
    assert report.bundle_to_stored.mean_difference < 0.1


@built
def test_the_trained_model_passes_the_default_thresholds(tmp_path: Path) -> None:
    folder = export(MODEL, tmp_path / "bundle", quantize="int4", operators="native")
    report = verify(folder, MODEL, tokens=768, new_tokens=16)
    assert report.failures == []


@built
def test_a_row_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    """Greedy tokens of uneven prompts, alone, together, and with other numbers of threads."""
    folder = export(MODEL, tmp_path / "bundle", quantize="int4", operators="native")
    prompts = ["She had been forced into prudence in her youth,", "The sea", "It was the best of times. " * 20]
    expected = [PhiMoE.load(folder, threads=1).generate(prompt, max_new_tokens=24).token_ids for prompt in prompts]
    model = PhiMoE.load(folder, threads=2)
    assert [each.token_ids for each in model.generate(prompts, max_new_tokens=24)] == expected


@built
def test_the_graph_without_optional_inputs_computes_the_same(tmp_path: Path, checkpoint: Checkpoint) -> None:
    source = checkpoint("longrope-window")
    folder = export(source, tmp_path / "bundle", quantize="int4", operators="native")
    graphs = [ir.load(folder / name).graph for name in ("model.onnx", "model.plain.onnx")]
    counted = [[(node.domain, node.op_type) for node in graph] for graph in graphs]
    assert counted[0] == counted[1]


@built
def test_the_cache_may_be_int8(tmp_path: Path) -> None:
    """Read by our own attention: what a stock bundle of the same numbers gives, and the same for one token as many."""
    stock, native = (
        export(MODEL, tmp_path / kind, quantize="int4", kv_cache="int8", operators=kind) for kind in ("stock", "native")
    )
    assert read_manifest(native).decoding.cache.dtype == "int8"
    assert not any(node.op_type == "GroupQueryAttention" for node in ir.load(native / "model.onnx").graph)
    report = verify(native, MODEL, tokens=3072, new_tokens=16)  # of fewer, single tokens that change experts decide
    assert report.failures == []
    prompt = "She had been forced into prudence in her youth, she learned romance as she grew older. " * 20
    model = PhiMoE.load(native, threads=2)
    assert len(model.tokenizer.encode(prompt)) > 256  # the window, and the rope's boundary
    ids = model.tokenizer.encode(prompt)
    assert (
        model.generate(ids, max_new_tokens=8).token_ids == PhiMoE.load(stock).generate(ids, max_new_tokens=8).token_ids
    )
    score = model.score(prompt)
    np.testing.assert_allclose(score.perplexity, PhiMoE.load(stock).score(prompt).perplexity, rtol=0.01)


@built
def test_the_cache_may_be_float16(tmp_path: Path) -> None:
    folder = export(MODEL, tmp_path / "bundle", quantize="int4", kv_cache="fp16", operators="native")
    manifest = read_manifest(folder)
    assert (manifest.dtype, manifest.decoding.cache.dtype) == ("float32", "float16")
    for file in (graph.file for graph in manifest.graphs):
        graph = ir.load(folder / file).graph
        values = [*graph.inputs, *graph.outputs]
        cached = [value.dtype for value in values if value.name.startswith(("past", "present"))]
        assert cached == [ir.DataType.FLOAT16] * 4 * manifest.decoding.cache.num_hidden_layers
    report = verify(folder, MODEL, tokens=768, new_tokens=16)
    assert report.failures == []
    model = PhiMoE.load(folder, threads=2)
    prompts = ["She had been forced into prudence in her youth,", "The sea", "It was the best of times. " * 40]
    alone = [model.generate(prompt, max_new_tokens=12).token_ids for prompt in prompts]  # the last beyond the window
    assert [each.token_ids for each in model.generate(prompts, max_new_tokens=12)] == alone
    with pytest.raises(ExportError, match=r"--target cpu has no --kv-cache fp16"):
        convert(folder, tmp_path / "stock", operators="stock")


@built
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_other_tasks(tmp_path: Path, checkpoint: Checkpoint, task: str) -> None:
    """As near to PyTorch over the stored weights as activations of 8 bits are, but where these moved a choice of
    experts.
    """
    source = checkpoint("plain", task)
    folder = export(source, tmp_path / "bundle", task=task, quantize="int8", operators="native")
    manifest = read_manifest(folder)
    model = stored_model(load_reference(source), folder, manifest)
    graph = session.open_sessions(folder, manifest, "cpu", 1).main
    differences = []
    for length in range(5, 40, 3):
        ids = np.array([random_ids(length)])
        found = graph.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64)).numpy()
        differences += (np.abs(found - expected).max(axis=-1) / expected.std()).flatten().tolist()
    assert 0 < np.median(differences) < 0.1
