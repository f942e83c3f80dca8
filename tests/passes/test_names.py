"""NameNodes: every name is readable and its own."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.passes.names import NameNodes
from tests.passes.graphs import Checkpoint, Traced, check_same


def test_name_nodes(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    common.InlinePass()(model)
    assert NameNodes()(model).modified
    names = [node.name for node in ir.traversal.RecursiveGraphIterator(model.graph)]
    assert len(set(names)) == len(names)
    moe = "model.layers.1.block_sparse_moe"
    assert {"model/CumSum", "model.layers.0/Add", "model.layers.0/Add_2", f"{moe}/TopK", "lm_head/MatMul"} < set(names)
    values = {value.name: node.name for node in model.graph for value in node.outputs}
    assert (values[f"{moe}/TopK.0"], values[f"{moe}/TopK.1"]) == (f"{moe}/TopK", f"{moe}/TopK")
    assert (values["lm_head/MatMul"], values["logits"]) == ("lm_head/MatMul", "lm_head/Add")
    check_same(model, traced("plain"), config)


def test_a_graph_without_traced_nodes_stays(traced: Traced) -> None:
    model = traced("plain")
    for node in model.graph:
        node.metadata_props.clear()
    before = [node.name for node in model.graph]
    assert not NameNodes()(model).modified
    assert [node.name for node in model.graph] == before
