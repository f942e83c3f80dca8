"""Residual sum and LayerNorm -> SkipLayerNormalization."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.exporter.passes._edit import MICROSOFT, expect, nodes, op, replace


class FuseSkipLayerNorm(ir.passes.InPlacePass):
    """Replaces Add(a, b) -> LayerNormalization by com.microsoft.SkipLayerNormalization, whose fourth output is the sum.

    The first LayerNorm of the model, which follows the embedding, has no sum before it and stays. Matches exactly twice
    a layer.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matched = 0
        for norm in nodes(model, "LayerNormalization"):
            add = norm.inputs[0].producer()
            if add is None or add.op_type != "Add" or add.inputs[0].shape != add.inputs[1].shape:
                continue
            name = norm.inputs[1].name.removesuffix(".weight")
            attributes: dict[str, int | float | str] = {"epsilon": norm.attributes["epsilon"].as_float()}
            inputs = [*add.inputs, *norm.inputs[1:]]
            fused = op(
                "SkipLayerNormalization",
                inputs,
                name,
                attributes,
                MICROSOFT,
                outputs=("", "/mean", "/inv_std_var", "/sum"),
            )
            values = [(norm.outputs[0], fused.outputs[0]), (add.outputs[0], fused.outputs[3])]
            model.graph.insert_after(norm, fused)
            replace(model.graph, [add, norm], [], values)
            matched += 1
        expect("residual sums and layer norms", matched, 2 * self.layers)
        model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified=True)
