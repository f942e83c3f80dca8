"""StoreHalf: weights are float16, and the numbers those of the rounded weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.passes.attention import FuseAttention
from phimoe_onnx.exporter.passes.experts_branches import BranchExperts
from phimoe_onnx.exporter.passes.experts_fused import FuseExperts
from phimoe_onnx.exporter.passes.experts_stored import StoreExperts
from phimoe_onnx.exporter.passes.half import StoreHalf
from phimoe_onnx.exporter.passes.projections import StoreProjections
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.exporter.weights import Weight
from phimoe_onnx.exporter.write import Layout
from tests.passes.graphs import Checkpoint, Traced, change, check_same

LAYERS = 2


def test_store_half(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("longrope"), read_config(checkpoint("longrope"))
    fp16 = recipe_for(config, TARGETS["cpu"], "fp16")
    FuseAttention(config)(model)
    StoreProjections(fp16)(model)
    common.RemoveUnusedNodesPass()(model)
    original = model.clone()
    before = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, Weight)
    }
    changed = change(model, StoreHalf(fp16))
    halves = {
        name for name, value in model.graph.initializers.items() if value.const_value.dtype == ir.DataType.FLOAT16
    }
    kept = {name for name in before if name in model.graph.initializers}
    assert changed == {"Cast": len(halves)}
    assert halves == {f"{name}.half" for name in before.keys() - kept}
    assert "lm_head.weight.transposed.half" in halves
    assert "model.layers.1.block_sparse_moe.experts.down_proj.half" in halves
    matrices = {name for name in kept if len(before[name].shape) > 1}
    routers = {f"model.layers.{layer}.block_sparse_moe.gate.weight.transposed" for layer in range(LAYERS)}
    assert matrices == routers | {"cos_cache", "sin_cache"}
    for name in halves:
        exact = before[name.removesuffix(".half")].numpy()
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), exact.astype(np.float16))
    for name in halves:  # PyTorch's rounding is numpy's, so the graph over rounded weights is the same
        value = original.graph.initializers[name.removesuffix(".half")]
        rounded = value.const_value.numpy().astype(np.float16).astype(np.float32)
        value.const_value = ir.tensor(rounded, name=value.name)
    check_same(model, original, config)


def test_store_half_keeps_shared_pieces_shared(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    fp16 = recipe_for(config, TARGETS["cpu"], "fp16")
    StoreExperts(LAYERS, fp16)(model)
    branched = model.clone()
    FuseExperts(config, fp16)(model)
    BranchExperts(config, fp16)(branched)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedNodesPass()(branched)
    store = StoreHalf(fp16)
    layout = Layout()
    with tempfile.TemporaryDirectory() as folder:
        for graph in (model, branched):
            store(graph)
        layout.save(model, Path(folder) / "model.onnx")
        before = layout.nbytes
        layout.save(branched, Path(folder) / "branches.onnx")
    assert layout.nbytes == before > 0
