"""The KV cache of attention -> float16, under activations of float32."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.exporter.passes._edit import NATIVE, expect, nodes

HALF = ir.TensorType(ir.DataType.FLOAT16)


class HalveCache(ir.passes.InPlacePass):
    """Makes every phimoe.native.Attention keep its keys and values as float16: the cache's inputs and outputs have that
    type, and the operator follows it.

    Matches exactly `num_hidden_layers` places.

    Args:
        num_hidden_layers: the model's.
    """

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__()
        self.num_hidden_layers = num_hidden_layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "Attention", NATIVE)
        expect("attention's cache", len(matches), self.num_hidden_layers)
        for attention in matches:
            for value in (*attention.inputs[3:5], *attention.outputs[1:3]):
                value.type = HALF
        return ir.passes.PassResult(model, modified=bool(matches))
