"""Residual sum and LayerNorm -> SkipLayerNormalization."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.exporter.passes._edit import MICROSOFT, Nodes, expect, nodes, replace


class FuseSkipLayerNorm(ir.passes.InPlacePass):
    """Residual sums join the LayerNorm behind them.

    1. Add(a, b) -> LayerNormalization becomes com.microsoft.SkipLayerNormalization.
    2. Whoever else read the sum reads the operator's fourth output.

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
            new = Nodes()
            outputs = new.several(
                "SkipLayerNormalization",
                *add.inputs,
                *norm.inputs[1:],
                name=name,
                outputs=("", "/mean", "/inv_std_var", "/sum"),
                domain=MICROSOFT,
                epsilon=norm.attributes["epsilon"].as_float(),
            )
            values = [(norm.outputs[0], outputs[0]), (add.outputs[0], outputs[3])]
            replace(model.graph, [add, norm], new, values)
            matched += 1
        expect("residual sums and layer norms", matched, 2 * self.layers)
        model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified=bool(matched))
