"""Runs, counts and changes graphs for the tests of passes."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.recipe import Recipe, recipe_for
from phimoe_onnx.exporter.staging import Journal
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.exporter.write import Layout, write_weights
from tests.checkpoints import assert_close, feeds, open_graph, random_ids

Traced = Callable[[str], ir.Model]
Checkpoint = Callable[[str], Path]


def recipe(config: PhiMoEConfig, target: str = "cpu", block_size: int | None = 32, **store: str) -> Recipe:
    """A recipe of plain weights but for `store`, whose keys name parameters by their end, a dot as two underscores."""
    patterns = {f"*{name.replace('__', '.')}": form for name, form in store.items()}
    return recipe_for(config, TARGETS[target], store=patterns, block_size=block_size, rounding="rtn")


def run(
    model: ir.Model, config: PhiMoEConfig, length: int = 45, rope_length: bool = True, **optional: int
) -> list[Any]:
    """Logits and presents of one row, computed by ONNX Runtime from a copy of the graph with its functions inlined."""
    model = model.clone()
    common.InlinePass()(model)
    common.RemoveUnusedNodesPass()(model)
    folder = Path(tempfile.mkdtemp())
    try:
        layout = Layout()
        layout.save(model, folder / "model.onnx")
        journal = Journal(folder, "plan")
        write_weights(layout, folder, journal, lambda nbytes: None)
        journal.close()
        inputs = feeds(config, [random_ids(length)], **({"rope_length": 0} if rope_length else {}), **optional)
        outputs: list[Any] = open_graph(folder / "model.onnx").run(None, inputs)
    finally:
        shutil.rmtree(folder)
    return outputs


def count(model: ir.Model) -> Counter[str]:
    """How often each operator stands in the main graph; other domains' are named domain::operator."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)


def change(model: ir.Model, how: ir.passes.InPlacePass) -> dict[str, int]:
    """Applies a pass; returns by how much the count of each operator changed, dead nodes left out before and after."""
    common.RemoveUnusedNodesPass()(model)
    before, text = count(model), str(model)
    modified = how(model).modified
    assert modified == (str(model) != text)
    common.RemoveUnusedNodesPass()(model)
    after = count(model)
    return {name: after[name] - before[name] for name in before | after if after[name] != before[name]}


def check_same(model: ir.Model, original: ir.Model, config: PhiMoEConfig) -> None:
    for got, expected in zip(run(model, config), run(original, config), strict=True):
        assert_close(got, expected)


def level_0(model: ir.Model) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
