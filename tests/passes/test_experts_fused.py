"""FuseExperts: QMoE and MoE over the stored weights."""

from __future__ import annotations

import dataclasses

import pytest

from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import MICROSOFT
from phimoe_onnx.exporter.passes.experts_branches import BranchExperts
from phimoe_onnx.exporter.passes.experts_fused import FuseExperts
from phimoe_onnx.exporter.passes.experts_stored import StoreExperts
from tests.passes.graphs import Checkpoint, Traced, change, check_same, level_0, recipe


@pytest.mark.parametrize("shape", ["plain", "experts"])
def test_fuse_experts_quantized(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    """Against branches over the same weights, at accuracy_level 0; the sizes of its inputs are QMoE's."""
    model, config = traced(shape), read_config(checkpoint(shape))
    layers, experts = config.num_hidden_layers, config.num_local_experts
    int4 = recipe(config, gate_up_proj="int4", down_proj="int4")
    StoreExperts(layers, int4)(model)
    branched = model.clone()
    changed = change(model, FuseExperts(config, int4))
    assert changed[f"{MICROSOFT}::QMoE"] == -changed[f"{DOMAIN}::Experts"] == layers
    assert changed["ScatterElements"] == changed["Log"] == changed["ReduceSum"] == layers
    assert f"{DOMAIN}::SparseMixer" not in changed
    assert f"{DOMAIN}::Attention" not in changed
    qmoe = next(node for node in model.graph if node.op_type == "QMoE")
    _, _, fc1, fc1_scales, _, fc2, fc2_scales = qmoe.inputs
    assert [tuple(value.shape.numpy()) for value in (fc1, fc1_scales, fc2, fc2_scales)] == [
        (experts, 192, 32),
        (experts, 192, 2),
        (experts, 64, 48),
        (experts, 64, 3),
    ]
    assert not [
        name for name in model.graph.initializers if "gate_up_proj" in name and model.graph.initializers[name].uses()
    ]
    level_0(model)
    BranchExperts(config, int4)(branched)
    level_0(branched)
    check_same(model, branched, config)


@pytest.mark.parametrize("shape", ["plain", "experts"])
def test_fuse_experts_in_float32(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    """Counted only: MoE on the CPU of some releases is wrong, which is why its bundles have branches."""
    model, config = traced(shape), read_config(checkpoint(shape))
    layers = config.num_hidden_layers
    StoreExperts(layers, recipe(config))(model)
    changed = change(model, FuseExperts(config, recipe(config)))
    assert changed[f"{MICROSOFT}::MoE"] == -changed[f"{DOMAIN}::Experts"] == layers
    moe = next(node for node in model.graph if node.op_type == "MoE")
    experts = config.num_local_experts
    assert [tuple(value.shape.numpy()) for value in (moe.inputs[2], moe.inputs[4])] == [
        (experts, 2 * config.intermediate_size, config.hidden_size),
        (experts, config.hidden_size, config.intermediate_size),
    ]


@pytest.mark.parametrize("lower", [FuseExperts, BranchExperts])
def test_the_experts_passes_want_every_layer(
    traced: Traced, checkpoint: Checkpoint, lower: type[FuseExperts] | type[BranchExperts]
) -> None:
    config = read_config(checkpoint("plain"))
    deeper = dataclasses.replace(config, num_hidden_layers=3)
    with pytest.raises(ExportError, match="the experts matched 2 places, expected 3"):
        lower(deeper, recipe(config))(traced("plain"))
