"""Another rounding, which is added here and nowhere else: with zero points, and with an eye on what it rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from phimoe_onnx import export, verify
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.tensors import shapes
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import ROUNDINGS, Rounding, recipe_for
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.parity.thresholds import Thresholds

Checkpoint = Callable[[str], Path]
seen: set[tuple[str, int | None]] = set()


def from_smallest_to_largest(
    weight: torch.Tensor, format: Format, parameter: str, expert: int | None
) -> tuple[torch.Tensor, ...]:
    """Each block over its own range."""
    seen.add((parameter, expert))
    blocks = weight.float().unflatten(-1, (-1, format.block_size))
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    largest = (1 << format.bits) - 1
    scales = ((high - low) / largest).clamp_min(1e-12)
    zeros = (-low / scales).round().clamp(0, largest)
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, largest)
    packed = (format.pack(part.to(torch.uint8)) for part in (codes.flatten(-2), zeros))
    codes, zeros = packed
    return codes, scales, zeros


@pytest.fixture
def minmax(monkeypatch: pytest.MonkeyPatch) -> str:
    """The rounding under the name minmax."""
    seen.clear()
    monkeypatch.setitem(ROUNDINGS, "minmax", Rounding(f"{__name__}:from_smallest_to_largest", symmetric=False))
    return "minmax"


@pytest.mark.parametrize("quantize", ["int4", "int8"])
@pytest.mark.parametrize("graph", ["model.onnx", "model.branches.onnx"])
def test_another_rounding(tmp_path: Path, checkpoint: Checkpoint, minmax: str, quantize: str, graph: str) -> None:
    """Both graphs read its zero points: they are PyTorch over what is stored, and that is near the original."""
    source = checkpoint("longrope-window")
    folder = export(source, tmp_path / "bundle", quantize=quantize, rounding=minmax)
    manifest = read_manifest(folder)
    assert {group.symmetric for group in manifest.weights if group.block_size} == {False}
    assert [each.file for each in manifest.graphs] == ["model.onnx", "model.branches.onnx"]
    zeros = [name for name in ir.load(folder / "model.onnx").graph.initializers if name.endswith(".zeros")]
    assert len(zeros) == 2 * 4 + 2  # of two layers' qkv, o, fc1 and fc2, the embedding and the head
    graphs = tuple(each for each in manifest.graphs if each.file == graph)
    dataclasses.replace(manifest, graphs=graphs).write(folder)
    report = verify(folder, source, tokens=150, new_tokens=4, thresholds=Thresholds(kl=0.5, kernel_kl=0.1))
    assert report.failures == []
    assert report.bundle_to_stored is not None
    assert report.bundle_to_stored.mean_difference < (0.2 if quantize == "int4" else 0.1)


def test_it_is_told_which_parameter_and_expert_it_is_at_work_on(
    tmp_path: Path, checkpoint: Checkpoint, minmax: str
) -> None:
    source = checkpoint("plain")
    export(source, tmp_path / "bundle", quantize="int4", rounding=minmax)
    matrices = {name: shape for name, shape in shapes(read_config(source)).items() if len(shape) > 1}
    expected = {
        (name, expert)
        for name, shape in matrices.items()
        if ".gate." not in name
        for expert in (range(shape[0]) if len(shape) == 3 else [None])
    }
    assert seen == expected


def test_the_plan_counts_its_zero_points_and_the_digest_knows_it(checkpoint: Checkpoint, minmax: str) -> None:
    config = read_config(checkpoint("plain"))
    plain, other = (recipe_for(config, TARGETS["cpu"], "int4", rounding=name) for name in ("rtn", minmax))
    assert plain.digest() != other.digest()
    assert (
        sum(other.form("lm_head.weight").nbytes(2048, 64)) - sum(plain.form("lm_head.weight").nbytes(2048, 64)) == 2048
    )


def test_an_unknown_rounding_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="rounding is 'best', expected one of rtn"):
        export(checkpoint("plain"), tmp_path / "bundle", quantize="int4", rounding="best")
