"""Linear layers -> MatMulNBits, the native Projection, or MatMul with its weight stored the way it is used."""

from __future__ import annotations

import onnx_ir as ir
import torch

from phimoe_onnx.exporter.passes._edit import (
    MICROSOFT,
    NATIVE,
    Nodes,
    by_block,
    initializer,
    nodes,
    only_user,
    parameter,
    replace,
)
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.strips import Strips, superblock_size
from phimoe_onnx.exporter.recipe import EMBEDDING, HEAD, ROUTER, Recipe
from phimoe_onnx.exporter.weights import (
    FLOATS,
    Parameter,
    Weight,
    in_blocks,
    in_columns,
    in_strips,
    job_piece,
    narrowed,
    parts_of,
)


class StoreProjections(ir.passes.InPlacePass):
    """Rewrites every MatMul(x, Transpose(W)) over a parameter W [N, K].

    1. Where the recipe has blocks for W, together with an Add of a bias behind it where there is one, to
       com.microsoft.MatMulNBits(x, codes, scales, zeros, bias).
    2. For native operators to phimoe.native.Projection(x, strips, bias). The router stays as it is: experts_native.py
       takes it.
    3. For standard operators to MatMul(x, DequantizeLinear(levels, scales)).
    4. Else to MatMul(x, W') with W' = W transposed [K, N] when the bundle is written, not at every load.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matched = 0
        for matmul in nodes(model, "MatMul"):
            transpose = matmul.inputs[1].producer()
            if transpose is None or transpose.op_type != "Transpose":
                continue
            weight = parameter(transpose.inputs[0])
            if weight is None:
                continue
            if weight.parameter == EMBEDDING:  # a tied head, whose form is its own
                rows = [part.rows for part in weight.parts]
                weight = Parameter(HEAD, weight.dtype, weight.shape.numpy(), parts_of(HEAD, weight.shape, rows))
            if self.recipe.operators == "native" and weight.parameter.endswith(ROUTER):
                continue
            form = self.recipe.form(weight.parameter)
            if isinstance(form, Strips):
                self._strips(model.graph, transpose, matmul, weight, form)
            elif isinstance(form, Format) and self.recipe.target.blocks == "DequantizeLinear":
                self._dequantize(model.graph, transpose, matmul, weight, form)
            elif isinstance(form, Format):
                self._quantize(model.graph, transpose, matmul, weight, form)
            else:
                _transpose(model.graph, transpose, matmul, weight)
            matched += 1
        return ir.passes.PassResult(model, modified=bool(matched))

    def _quantize(
        self, graph: ir.Graph, transpose: ir.Node, matmul: ir.Node, weight: Parameter, format: Format
    ) -> None:
        name = weight.name.removesuffix(".weight")
        codes, *others = in_blocks(name, weight, format, self.recipe)
        stored = [initializer(graph, part) for part in (by_block(codes, format), *others)]
        old, bias = _with_bias(transpose, matmul)
        new = Nodes()
        output = new.matmul_nbits(matmul.inputs[0], stored, f"{name}/MatMulNBits", format, bias)
        replace(graph, old, new, [(old[-1].outputs[0], output)])
        graph.opset_imports[MICROSOFT] = 1

    def _dequantize(
        self, graph: ir.Graph, transpose: ir.Node, matmul: ir.Node, weight: Parameter, form: Format
    ) -> None:
        name = weight.name.removesuffix(".weight")
        levels, scales = (initializer(graph, each) for each in in_columns(name, weight.parts, form, self.recipe))
        new = Nodes()
        output = new.matmul_dequantized(matmul.inputs[0], levels, scales, name, form)
        replace(graph, [transpose, matmul], new, [(matmul.outputs[0], output)])

    def _strips(self, graph: ir.Graph, transpose: ir.Node, matmul: ir.Node, weight: Parameter, form: Strips) -> None:
        name = weight.name.removesuffix(".weight")
        n, k = weight.shape.numpy()
        strips = initializer(graph, in_strips(name, weight, form, self.recipe))
        old, bias = _with_bias(transpose, matmul)
        new = Nodes()
        output = new.add(
            "Projection",
            matmul.inputs[0],
            strips,
            *([] if bias is None else [bias]),
            name=f"{name}/Projection",
            domain=NATIVE,
            in_features=k,
            out_features=n,
            bits=form.bits,
            superblock_size=superblock_size(k),
        )
        replace(graph, old, new, [(old[-1].outputs[0], output)])
        graph.opset_imports[NATIVE] = 1


def _with_bias(transpose: ir.Node, matmul: ir.Node) -> tuple[list[ir.Node], ir.Value | None]:
    """The nodes of a projection in graph order, and its bias where one is added behind it."""
    add = only_user(matmul.outputs[0])
    if add is not None and add.op_type == "Add" and parameter(add.inputs[1]) is not None:
        return [transpose, matmul, add], add.inputs[1]
    return [transpose, matmul], None


def _transpose(graph: ir.Graph, transpose: ir.Node, matmul: ir.Node, weight: Parameter) -> None:
    rows, columns = weight.shape.numpy()
    dtype = FLOATS[weight.dtype]

    def run() -> torch.Tensor:
        return torch.cat([narrowed(part.rows.read(), dtype, part.parameter) for part in weight.parts]).T

    piece = job_piece(run, (columns, rows), weight.dtype, weight.parts[0].layer)
    name = f"{weight.name}.transposed"
    stored = initializer(graph, Weight(name, weight.dtype, (columns, rows), [piece], weight.parameter))
    new = Nodes()
    output = new.add("MatMul", matmul.inputs[0], stored, name=f"{weight.name.removesuffix('.weight')}/MatMul")
    replace(graph, [transpose, matmul], new, [(matmul.outputs[0], output)])
