"""FuseSkipLayerNorm: the numbers stay, and sums join the norms behind them."""

from __future__ import annotations

import pytest

from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.passes._edit import MICROSOFT
from phimoe_onnx.exporter.passes.norms import FuseSkipLayerNorm
from tests.passes.graphs import Checkpoint, Traced, change, check_same


@pytest.mark.parametrize("shape", ["plain", "no-bias", "experts"])
def test_fuse_skip_layer_norm(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    layers = config.num_hidden_layers
    changed = change(model, FuseSkipLayerNorm(layers))
    fused = {f"{MICROSOFT}::SkipLayerNormalization": 2 * layers, "LayerNormalization": -2 * layers, "Add": -2 * layers}
    assert changed == fused
    (first,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert first.inputs[0].producer().op_type == "Gather"  # no sum stands before it
    check_same(model, traced(shape), config)


def test_fuse_skip_layer_norm_wants_every_layer(traced: Traced) -> None:
    model = traced("plain")
    norm = [node for node in model.graph if node.op_type == "LayerNormalization"][2]
    norm.op_type = "Another"
    with pytest.raises(ExportError, match="residual sums and layer norms matched 3 places, expected 4"):
        FuseSkipLayerNorm(2)(model)
