"""BranchExperts: the numbers stay, and the bytes are those of the fused operator."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes.experts_branches import BranchExperts
from phimoe_onnx.exporter.passes.experts_fused import FuseExperts
from phimoe_onnx.exporter.passes.experts_stored import StoreExperts
from phimoe_onnx.exporter.write import Layout
from tests.passes.graphs import Checkpoint, Traced, change, check_same, recipe

LAYERS = 2


@pytest.mark.parametrize("shape", ["plain", "experts"])
def test_branch_experts_in_float32(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    layers, experts = config.num_hidden_layers, config.num_local_experts
    StoreExperts(layers, recipe(config))(model)
    changed = change(model, BranchExperts(config, recipe(config)))
    assert changed["If"] == layers * experts
    assert changed[f"{DOMAIN}::Experts"] == -layers
    inside = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    assert inside["Gemm"] == 2 * layers * experts
    assert inside["ScatterND"] == inside["NonZero"] == layers * experts
    check_same(model, traced(shape), config)


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_branches_share_the_operators_bytes(traced: Traced, checkpoint: Checkpoint, form: str) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    stored = recipe(config, gate_up_proj=form, down_proj=form)
    StoreExperts(LAYERS, stored)(model)
    branched = model.clone()
    FuseExperts(config, stored)(model)
    BranchExperts(config, stored)(branched)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedNodesPass()(branched)
    prefix = "model.layers.0.block_sparse_moe.experts.fc1"
    for kind in ("codes", "scales"):
        stack = model.graph.initializers[f"{prefix}.{kind}"].const_value
        pieces = [branched.graph.initializers[f"{prefix}.{kind}.{e}"].const_value.pieces for e in range(16)]
        assert sum(pieces, ()) == stack.pieces
    layout = Layout()
    with tempfile.TemporaryDirectory() as folder:
        layout.save(model, Path(folder) / "model.onnx")
        before = layout.nbytes
        layout.save(branched, Path(folder) / "branches.onnx")
    assert layout.nbytes == before > 0


def test_no_weight_has_two_owners(traced: Traced, checkpoint: Checkpoint) -> None:
    """The branches alone hold what they read: later passes rename a weight whose name the main graph has, too."""
    model, config = traced("plain"), read_config(checkpoint("plain"))
    stored = recipe(config, "portable", gate_up_proj="int4", down_proj="int4")
    StoreExperts(LAYERS, stored)(model)
    BranchExperts(config, stored)(model)
    inside = {name for graph in model.graph.subgraphs() for name in graph.initializers}
    assert "model.layers.0.block_sparse_moe.experts.fc1.levels.3" in inside
    assert not inside & set(model.graph.initializers)
