"""Weights stored as float16 under a float32 graph."""

from __future__ import annotations

import onnx_ir as ir
import torch

from phimoe_onnx.exporter.passes._edit import initializer, op
from phimoe_onnx.exporter.weights import Job, Piece, Weight

# the router, a classifier's head, the rope and scales stay exact
KEPT = (".gate.weight.transposed", "score.weight", "cos_cache", "sin_cache", "_cache.scale")


class StoreHalf(ir.passes.InPlacePass):
    """Stores every float32 weight of two or more dimensions as float16, with a Cast to float32 behind it.

    ONNX Runtime folds the Cast when it loads the graph, so it computes in float32 with the rounded weights. Vectors,
    the router, a classifier's head and the rope tables stay float32. One instance serves several graphs over the same
    pieces.
    """

    def __init__(self) -> None:
        super().__init__()
        self.halves: dict[Piece, Piece] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for value in list(graph.initializers.values()):
            weight = value.const_value
            if not isinstance(weight, Weight) or weight.dtype != ir.DataType.FLOAT or len(weight.shape) < 2:
                continue
            if weight.name.endswith(KEPT):
                continue
            pieces = [self._half(piece) for piece in weight.pieces]
            half = initializer(graph, Weight(f"{weight.name}.half", ir.DataType.FLOAT16, weight.shape.numpy(), pieces))
            cast = op("Cast", [half], f"{weight.name}/Cast", {"to": ir.DataType.FLOAT})
            cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
            graph.insert_before(graph[0], cast)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            del graph.initializers[value.name]
        return ir.passes.PassResult(model, modified=True)

    def _half(self, piece: Piece) -> Piece:
        if piece not in self.halves:
            job = Job(lambda: (piece.job.run()[piece.index].to(torch.float16),), (piece.nbytes // 2,))
            self.halves[piece] = Piece(job, 0)
        return self.halves[piece]
