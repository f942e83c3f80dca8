"""int4 and int8 in standard operators: the numbers of the cpu target with the same rounding, read by whatever reads
opset 21.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from phimoe_onnx import export, reference
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.parity.stored import stored_model
from phimoe_onnx.parity.thresholds import Thresholds
from phimoe_onnx.parity.verify import verify
from tests.checkpoints import MODEL, assert_close, feeds, open_graph, random_ids

Checkpoint = Callable[..., Path]
Bundle = Callable[..., Path]
SHAPES = ("plain", "tied", "head_dim", "experts", "longrope-window")
LOOSE = Thresholds(kl=0.5, kernel_kl=0.1, perplexity_ratio=1.2)  # a random model's logits say little
GRID = [(shape, form) for shape in SHAPES for form in ("int4", "int8")]


@pytest.mark.parametrize(("shape", "form"), GRID)
def test_only_standard_operators(bundle: Bundle, shape: str, form: str) -> None:
    path = bundle(shape, "portable", form) / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = ir.load(path)
    assert dict(model.opset_imports) == {"": 21}
    assert {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)} == {""}


@pytest.mark.parametrize(("shape", "form"), GRID)
def test_the_graph_is_pytorch_over_the_stored_weights(
    checkpoint: Checkpoint, bundle: Bundle, shape: str, form: str
) -> None:
    folder = bundle(shape, "portable", form)
    exact = reference.load_reference(checkpoint(shape))
    model = stored_model(exact, folder, read_manifest(folder))
    ids = random_ids(60)
    expected = reference.logits(model, ids)
    # as it is written; optimised, ONNX Runtime rounds activations to int8
    logits, *_ = open_graph(folder / "model.onnx", optimize=False).run(["logits"], feeds(model.config, [ids]))
    assert_close(logits[0], expected)
    assert np.abs(expected - reference.logits(exact, ids)).mean() > 1e-3 * expected.std()  # the weights were rounded


@pytest.mark.parametrize(("shape", "form"), GRID)
def test_the_numbers_are_the_cpu_targets(checkpoint: Checkpoint, bundle: Bundle, shape: str, form: str) -> None:
    exact = reference.load_reference(checkpoint(shape))
    portable, cpu = (
        stored_model(exact, folder, read_manifest(folder)).state_dict()
        for folder in (bundle(shape, target, form, rounding="rtn") for target in ("portable", "cpu"))
    )
    assert {name for name in cpu if not torch.equal(cpu[name], portable[name])} == set()


@pytest.mark.parametrize(("shape", "form"), GRID)
def test_verify_passes(checkpoint: Checkpoint, bundle: Bundle, shape: str, form: str) -> None:
    report = verify(bundle(shape, "portable", form), checkpoint(shape), tokens=100, new_tokens=4, thresholds=LOOSE)
    assert report.failures == []


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_it_runs_in_onnx_itself(checkpoint: Checkpoint, bundle: Bundle, form: str) -> None:
    folder = bundle("plain", "portable", form)
    model = stored_model(reference.load_reference(checkpoint("plain")), folder, read_manifest(folder))
    ids = random_ids(6)
    inputs = feeds(model.config, [ids], logits_to_keep=0, rope_length=0)
    found = ReferenceEvaluator(str(folder / "model.onnx")).run(["logits"], inputs)[0][0]
    assert_close(found, reference.logits(model, ids))


def test_exports_do_not_touch_each_other(tmp_path: Path) -> None:
    """The functions of the traced graph are the same objects for every export of a process."""
    export(MODEL, tmp_path / "a", target="portable", quantize="int8")
    export(MODEL, tmp_path / "b", target="portable")
    assert {ir.load(tmp_path / name / "model.onnx").opset_imports[""] for name in "ab"} == {18, 21}
