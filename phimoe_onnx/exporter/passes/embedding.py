"""The embedding table -> GatherBlockQuantized, or standard operators."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.exporter.passes._edit import MICROSOFT, Nodes, constant, expect, initializer, nodes, parameter, replace
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import EMBEDDING, Recipe
from phimoe_onnx.exporter.weights import Job, Parameter, Piece, Weight, in_blocks


class QuantizeEmbedding(ir.passes.InPlacePass):
    """Replaces Gather(embed_tokens, input_ids) where the recipe has blocks for it.

    1. By com.microsoft.GatherBlockQuantized.
    2. In standard operators by a product of the gathered rows of levels, int8 [V, H], and of scales.

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
    """Gathers rows of levels and of scales, and multiplies block by block.

    That is DequantizeLinear written out: OpenVINO 2026.4 knows it for tensors of a fixed shape alone.
    """
    codes, scales = stored
    vocab_size, hidden_size = codes.shape.numpy()
    signed = [_signed(piece) for piece in codes.pieces]
    levels = Weight(f"{name}.levels", ir.DataType.INT8, (vocab_size, hidden_size), signed, EMBEDDING)
    new = Nodes()
    rows, factors = (
        new.add("Gather", initializer(graph, each), gather.inputs[1], name=f"{each.name}/Gather")
        for each in (levels, scales)
    )
    in_blocks = constant(graph, f"{name}.in_blocks", [0, 0, -1, form.block_size])
    in_row = constant(graph, f"{name}.in_row", [0, 0, hidden_size])
    rows = new.add("Cast", rows, name=f"{name}/Cast", to=scales.dtype)
    rows = new.add("Reshape", rows, in_blocks, name=f"{name}/blocks")
    factors = new.add("Unsqueeze", factors, constant(graph, "axis_3", [3]), name=f"{name}/Unsqueeze")
    rows = new.add("Mul", rows, factors, name=f"{name}/Mul")
    output = new.add("Reshape", rows, in_row, name=f"{name}/Reshape")
    replace(graph, [gather], new, [(gather.outputs[0], output)])


def _signed(piece: Piece) -> Piece:
    """The same numbers around 0, in 8 bits."""
    return Piece(Job(lambda: (piece.job.run()[piece.index] ^ 128,), (piece.nbytes,), piece.job.layer), 0)
