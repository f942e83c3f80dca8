"""Bundles of the small model on whichever ONNX Runtime is installed; noxfile.py runs this with the oldest one that is
supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from phimoe_onnx import PhiMoE, parity, reference
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.parity.stored import stored_model
from phimoe_onnx.runtime.ort.session import choose_graph
from tests.checkpoints import MODEL, assert_close, at_level_0

OLD = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 31)
TEXT = Path(parity.__file__).with_name("persuasion.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "quantize", "graph"),
    [
        ("cpu", "none", "model.onnx"),
        ("portable", "none", "model.onnx"),
        ("cpu", "int4", "model.branches.onnx" if OLD else "model.onnx"),
    ],
)
def test_bundle(tmp_path: Path, target: str, quantize: str, graph: str) -> None:
    folder = export(MODEL, tmp_path / "bundle", target=target, quantize=quantize, operators="stock")
    manifest = read_manifest(folder)
    assert choose_graph(manifest, "cpu", onnxruntime.__version__).file == graph
    expected = stored_model(reference.load_reference(MODEL), folder, manifest)
    if quantize != "none":
        folder = at_level_0(folder, tmp_path / "exact", graph)
    model = PhiMoE.load(folder, threads=1)
    ids = model.tokenizer.encode(TEXT)
    for length in (20, 300):  # on both sides of the rope boundary
        assert_close(model.logits(ids[:length]), reference.logits(expected, ids[:length]))
    # across the boundary
    assert model.generate(ids[:240], max_new_tokens=40).token_ids == reference.greedy(expected, ids[:240], 40)


@pytest.mark.parametrize(("target", "quantize"), [("cpu", "none"), ("portable", "none"), ("cpu", "int4")])
def test_whole_texts(tmp_path: Path, target: str, quantize: str) -> None:
    """Texts on both sides of the rope boundary in one batch of a graph without a cache."""
    options: dict[str, Any] = {"task": "feature-extraction", "operators": "stock"}
    folder = export(MODEL, tmp_path / "bundle", target=target, quantize=quantize, **options)
    manifest = read_manifest(folder)
    expected = stored_model(reference.load_reference(MODEL, manifest.task), folder, manifest)
    if quantize != "none":
        folder = at_level_0(folder, tmp_path / "exact", choose_graph(manifest, "cpu", onnxruntime.__version__).file)
    model = PhiMoE.load(folder, threads=1)
    ids = model.tokenizer.encode(TEXT)
    texts = [ids[:length] for length in (200, 256, 257, 300)]
    assert_close(model.embed(texts), np.stack([reference.last(expected, text) for text in texts]))
