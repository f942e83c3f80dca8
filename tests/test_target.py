"""Targets: what they take, and a fourth one that is added here and nowhere else."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

import phimoe_onnx
from phimoe_onnx import export, verify
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.cli.export import main
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.target import CUDA, TARGETS, Device, Target
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import random_ids

Checkpoint = Callable[[str], Path]

# Plain attention over a cache that grows, and experts in blocks: parts that no other target has together.
MIXED = Target(
    name="mixed",
    devices=(Device("cpu", "1.30", ("float32",)),),
    dtypes=("float32",),
    attention="standard",
    skip_norm=True,
    experts=("branches",),
    forms=("none", "int4"),
    no_form="nobody has asked for it",
    kv_cache=("none",),
    no_kv_cache="its cache grows",
    prefill_chunk=16,
)


def test_a_fourth_target_exports_plans_runs_and_verifies(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TARGETS, "mixed", MIXED)
    source = checkpoint("longrope-window")
    assert main([str(source), "--plan", "--target", "mixed"]) == 0
    assert re.findall(r"^ *mixed +(\w+)", capsys.readouterr().out, re.MULTILINE) == ["none", "int4"]
    for quantize in ("none", "int4"):
        folder = export(source, tmp_path / quantize, target="mixed", quantize=quantize)
        manifest = read_manifest(folder)
        assert [(graph.file, graph.devices) for graph in manifest.graphs] == [("model.onnx", {"cpu": "1.30"})]
        assert (manifest.target, manifest.decoding.prefill_chunk, manifest.decoding.cache.shared) == (
            "mixed",
            16,
            False,
        )
        assert not (folder / "genai_config.json").exists()
        operators = {node.op_type for node in ir.load(folder / "model.onnx").graph}
        assert {"If", "SkipLayerNormalization", "Softmax"} <= operators
        assert ("MatMulNBits" in operators) == (quantize == "int4")
        assert len(PhiMoE.load(folder).generate(random_ids(40), max_new_tokens=5).token_ids) > 0
    report = verify(tmp_path / "none", source, tokens=120, new_tokens=12)
    assert report.failures == []
    assert report.greedy["agreeing"] == 12
    report = verify(tmp_path / "int4", source, tokens=120, new_tokens=4)
    assert report.bundle_to_stored is not None
    assert report.bundle_to_stored.mean_difference < report.bundle_to_reference.mean_difference / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "fp16"}, "--target mixed has no fp16: nobody has asked for it; use none or int4"),
        ({"kv_cache": "int8"}, "--target mixed has no --kv-cache int8: its cache grows"),
        ({"dtype": "float16"}, "--target mixed has no --dtype float16, expected float32"),
    ],
)
def test_what_a_target_lacks_has_a_reason(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.setitem(TARGETS, "mixed", MIXED)
    with pytest.raises(ExportError, match=re.escape(message)):
        export(checkpoint("plain"), tmp_path / "bundle", target="mixed", **options)


def test_no_other_file_knows_targets_by_name() -> None:
    """The exporter asks a target for its facts; a name in quotes would be a test of it."""
    exporter = Path(phimoe_onnx.__file__).parent / "exporter"
    files = [path for path in exporter.rglob("*.py") if path.name not in ("target.py", "pipeline.py")]
    assert len(files) > 25
    named = re.compile(r'"(cpu|cuda|portable)"|is_cuda|target\.name *[=!]=|target *[=!]= *"')
    found = {path.name: named.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {name: names for name, names in found.items() if names} == {}
    defaults = named.findall((exporter / "pipeline.py").read_text(encoding="utf-8"))
    assert defaults == ["cpu", "cpu", "cuda", "portable"]  # the default of `target`, and its docstring


@pytest.mark.parametrize(("head_dim", "fits"), [(8, False), (16, True), (24, False), (32, True), (96, True)])
def test_head_dims_that_group_query_attention_takes(checkpoint: Checkpoint, head_dim: int, fits: bool) -> None:
    config = dataclasses.replace(read_config(checkpoint("plain")), head_dim=head_dim)
    TARGETS["portable"].check(config, ["none"], "none")
    for target in (TARGETS["cpu"], TARGETS["cuda"]):
        if fits:
            target.check(config, ["none"], "none")
        else:
            with pytest.raises(ExportError, match=rf"head_dim is {head_dim}.*--target portable"):
                target.check(config, ["none"], "none")


def test_a_graph_needs_the_newest_release_that_any_of_its_parts_needs() -> None:
    assert CUDA.devices_for("float16", "fused") == {"cuda": "1.31", "cpu": "1.32"}
    assert CUDA.devices_for("bfloat16", "fused") == {"cuda": "1.31"}
    nine = dataclasses.replace(MIXED, devices=(Device("cpu", "1.9", ("float32",)),))
    assert nine.devices_for("float32", "branches") == {"cpu": "1.29"}  # numbers, not text
