"""StoreExperts: the experts' weights in the recipe's form, once for all graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.passes.experts_stored import ExpertsWeights, StoreExperts
from phimoe_onnx.exporter.quantize.format import Format
from tests.passes.graphs import Checkpoint, Traced, recipe

LAYERS = 2
INT8 = Format(8, 32)


def test_fc1_has_gate_and_up_in_turns(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    gate_up = model.graph.initializers["model.layers.1.block_sparse_moe.experts.gate_up_proj"].const_value.numpy()
    gate_up = gate_up.reshape(16, 192, 64).copy()
    exact, quantized = model.clone(), model.clone()
    assert StoreExperts(LAYERS, recipe(config))(exact).modified
    StoreExperts(LAYERS, recipe(config, gate_up_proj="int8"))(quantized)
    prefix = "model.layers.1.block_sparse_moe.experts.fc1"
    fc1 = exact.graph.initializers[f"{prefix}.weight"].const_value.numpy()
    np.testing.assert_array_equal(fc1[:, 0::2], gate_up[:, :96])
    np.testing.assert_array_equal(fc1[:, 1::2], gate_up[:, 96:])
    codes, scales = (
        torch.from_numpy(quantized.graph.initializers[f"{prefix}.{kind}"].const_value.numpy())
        for kind in ("codes", "scales")
    )
    np.testing.assert_allclose(INT8.dequantize(codes, scales), fc1, atol=np.abs(fc1).max() / 200)


@pytest.mark.parametrize("expert", [0, 3])
def test_experts_that_differ_are_stored_each_by_itself(traced: Traced, checkpoint: Checkpoint, expert: int) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    StoreExperts(LAYERS, recipe(config, **{f"experts__down_proj__{expert}": "int8"}))(model)
    node = next(node for node in model.graph if node.op_type == "Experts")
    stored = ExpertsWeights.of(node)
    assert [weight.name.rpartition("experts.")[2] for weight in stored.gate_up] == ["fc1.weight"]
    names = [f"fc2.weight.{e}" for e in range(16)]
    names[expert : expert + 1] = [f"fc2.codes.{expert}", f"fc2.scales.{expert}"]
    assert [weight.name.rpartition("experts.")[2] for weight in stored.down] == names
    assert stored.down[expert].shape == (64, 3, 32)  # as MatMulNBits takes it
    assert {weight.expert for weight in stored.down} == set(range(16))


def test_store_experts_wants_every_layer(traced: Traced, checkpoint: Checkpoint) -> None:
    with pytest.raises(ExportError, match="the experts matched 2 places, expected 3"):
        StoreExperts(LAYERS + 1, recipe(read_config(checkpoint("plain"))))(traced("plain"))
