"""The embedding table -> GatherBlockQuantized."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.exporter.passes._edit import MICROSOFT, Nodes, expect, initializer, nodes, parameter, replace
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import EMBEDDING, Recipe
from phimoe_onnx.exporter.weights import Parameter, in_blocks


class QuantizeEmbedding(ir.passes.InPlacePass):
    """Replaces Gather(embed_tokens, input_ids) by com.microsoft.GatherBlockQuantized where the recipe has blocks for
    it.

    Matches exactly one place, or does nothing.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        form = self.recipe.form(EMBEDDING)
        if not isinstance(form, Format):
            return ir.passes.PassResult(model, modified=False)
        matches = [node for node in nodes(model, "Gather") if parameter(node.inputs[0]) is not None]
        expect("the embedding", len(matches), 1)
        (gather,) = matches
        weight = parameter(gather.inputs[0])
        assert isinstance(weight, Parameter)
        name = EMBEDDING.removesuffix(".weight")  # a tied parameter is called after the head
        codes, *others = (initializer(model.graph, part) for part in in_blocks(name, weight, form, self.recipe))
        new = Nodes()
        output = new.add(
            "GatherBlockQuantized",
            codes,
            gather.inputs[1],
            *others,
            name=f"{name}/GatherBlockQuantized",
            domain=MICROSOFT,
            bits=form.bits,
            block_size=form.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        replace(model.graph, [gather], new, [(gather.outputs[0], output)])
        model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified=True)
