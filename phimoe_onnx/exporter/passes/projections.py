"""Linear layers -> MatMulNBits, or MatMul with its weight stored the way it is used."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.checkpoint.tensors import read_rows
from phimoe_onnx.exporter.passes._edit import MICROSOFT, initializer, nodes, only_user, op, parameter, replace
from phimoe_onnx.exporter.quantize.rtn import Format
from phimoe_onnx.exporter.weights import FLOATS, Parameter, Weight, job_piece


class StoreProjections(ir.passes.InPlacePass):
    """Rewrites every MatMul(x, Transpose(W)) over a parameter W [N, K].

    1. Where `formats` names a format for W, together with an Add of a bias behind it where there is one, to
       com.microsoft.MatMulNBits(x, codes, scales, bias).
    2. Else to MatMul(x, W') with W' = W transposed [K, N] when the bundle is written, not at every load.

    Args:
        formats: the ending of a weight's name -> its format.
    """

    def __init__(self, formats: dict[str, Format]) -> None:
        super().__init__()
        self.formats = formats

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for matmul in nodes(model, "MatMul"):
            transpose = matmul.inputs[1].producer()
            if transpose is None or transpose.op_type != "Transpose":
                continue
            weight = parameter(transpose.inputs[0])
            if weight is None:
                continue
            name = weight.name.removesuffix(".weight")
            format = next((format for ending, format in self.formats.items() if name.endswith(ending)), None)
            if format is None:
                self._transpose(model.graph, transpose, matmul, weight)
            else:
                self._quantize(model.graph, transpose, matmul, weight, format)
        return ir.passes.PassResult(model, modified=True)

    def _transpose(self, graph: ir.Graph, transpose: ir.Node, matmul: ir.Node, weight: Parameter) -> None:
        rows, columns = weight.shape.numpy()
        dtype = FLOATS[weight.dtype]
        piece = job_piece(lambda: read_rows(weight.rows).T.to(dtype), (columns, rows), weight.dtype)
        stored = initializer(graph, Weight(f"{weight.name}.transposed", weight.dtype, (columns, rows), [piece]))
        name = weight.name.removesuffix(".weight")
        new = op("MatMul", [matmul.inputs[0], stored], f"{name}/MatMul")
        replace(graph, [transpose, matmul], [new], [(matmul.outputs[0], new.outputs[0])])

    def _quantize(
        self, graph: ir.Graph, transpose: ir.Node, matmul: ir.Node, weight: Parameter, format: Format
    ) -> None:
        name = weight.name.removesuffix(".weight")
        codes, scales = format.codes_and_scales(weight, name)
        n, blocks = scales.shape.numpy()
        blocked = Weight(codes.name, codes.dtype, (n, blocks, format.block_bytes), codes.pieces)
        old, inputs = [transpose, matmul], [matmul.inputs[0], initializer(graph, blocked), initializer(graph, scales)]
        add = only_user(matmul.outputs[0])
        if add is not None and add.op_type == "Add" and parameter(add.inputs[1]) is not None:
            old.append(add)
            inputs += [None, None, add.inputs[1]]
        new = op("MatMulNBits", inputs, f"{name}/MatMulNBits", format.attributes(n, blocks), MICROSOFT)
        replace(graph, old, [new], [(old[-1].outputs[0], new.outputs[0])])
        graph.opset_imports[MICROSOFT] = 1
