"""Weights stored as float16 under a float32 graph."""

from __future__ import annotations

import onnx_ir as ir
import torch

from phimoe_onnx.exporter.passes._edit import Nodes, initializer
from phimoe_onnx.exporter.quantize.format import Plain
from phimoe_onnx.exporter.recipe import Recipe
from phimoe_onnx.exporter.weights import Job, Piece, Weight

HALF = Plain("float16")


class StoreHalf(ir.passes.InPlacePass):
    """Stores the float32 weights that the recipe wants as float16, with a Cast to float32 behind each.

    ONNX Runtime folds the Cast when it loads the graph, so it computes in float32 with the rounded weights. One
    instance serves several graphs over the same pieces.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.halves: dict[Piece, Piece] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        stored = [(value, value.const_value) for value in graph.initializers.values()]
        wanted = [(value, weight) for value, weight in stored if isinstance(weight, Weight) and self._is_half(weight)]
        for value, weight in wanted:
            pieces = [self._half(piece) for piece in weight.pieces]
            half = Weight(f"{weight.name}.half", ir.DataType.FLOAT16, weight.shape.numpy(), pieces, weight.parameter)
            new = Nodes()
            cast = new.add("Cast", initializer(graph, half), name=f"{weight.name}/Cast", to=ir.DataType.FLOAT)
            cast.type, cast.shape = value.type, value.shape
            graph.insert_before(graph[0], new)
            ir.convenience.replace_all_uses_with(value, cast)
            del graph.initializers[value.name]
        return ir.passes.PassResult(model, modified=bool(wanted))

    def _is_half(self, weight: Weight) -> bool:
        if weight.dtype != ir.DataType.FLOAT or not weight.parameter:
            return False
        return self.recipe.form(weight.parameter, weight.expert) == HALF

    def _half(self, piece: Piece) -> Piece:
        if piece not in self.halves:
            job = Job(lambda: (piece.job.run()[piece.index].to(torch.float16),), (piece.nbytes // 2,), piece.job.layer)
            self.halves[piece] = Piece(job, 0)
        return self.halves[piece]
