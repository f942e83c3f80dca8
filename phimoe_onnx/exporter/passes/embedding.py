"""The embedding table -> GatherBlockQuantized, or standard operators."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.exporter.passes._edit import MICROSOFT, Nodes, expect, initializer, nodes, parameter, replace
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import EMBEDDING, Recipe
from phimoe_onnx.exporter.weights import Job, Parameter, Piece, Weight, in_blocks


class QuantizeEmbedding(ir.passes.InPlacePass):
    """Replaces Gather(embed_tokens, input_ids) where the recipe has blocks for it.

    1. By com.microsoft.GatherBlockQuantized.
    2. In standard operators by a DequantizeLinear over the gathered rows of levels, int8 [V, H], and of scales.

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
        if self.recipe.target.blocks == "DequantizeLinear":
            _dequantize(model.graph, gather, in_blocks(name, weight, form, self.recipe), name, form)
            return ir.passes.PassResult(model, modified=True)
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


def _dequantize(graph: ir.Graph, gather: ir.Node, stored: list[Weight], name: str, form: Format) -> None:
    """Gathers rows of levels and of scales, and multiplies."""
    codes, scales = stored
    levels = Weight(
        f"{name}.levels", ir.DataType.INT8, codes.shape.numpy(), [_signed(piece) for piece in codes.pieces], EMBEDDING
    )
    new = Nodes()
    rows = [
        new.add("Gather", initializer(graph, each), gather.inputs[1], name=f"{each.name}/Gather")
        for each in (levels, scales)
    ]
    output = new.add("DequantizeLinear", *rows, name=f"{name}/DequantizeLinear", axis=2, block_size=form.block_size)
    replace(graph, [gather], new, [(gather.outputs[0], output)])


def _signed(piece: Piece) -> Piece:
    """The same numbers around 0, in 8 bits."""
    return Piece(Job(lambda: (piece.job.run()[piece.index] ^ 128,), (piece.nbytes,), piece.job.layer), 0)
