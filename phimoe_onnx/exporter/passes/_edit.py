"""Small edits that the passes share: finding, building and replacing nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.weights import Parameter, Weight

MICROSOFT = "com.microsoft"
NATIVE = "phimoe.native"  # the domain of this project's own operators


def nodes(model: ir.Model, op_type: str, domain: str = "") -> list[ir.Node]:
    """The main graph's nodes of one kind, as a list that stays valid while the graph is edited."""
    return [node for node in model.graph if node.op_type == op_type and node.domain == domain]


def parameter(value: ir.Value | None) -> Parameter | None:
    """The checkpoint parameter that `value` is an initializer of, else None."""
    return value.const_value if value is not None and isinstance(value.const_value, Parameter) else None


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name, added where the graph lacks it; another Weight of the same name is an error."""
    assert tensor.name
    known = graph.initializers.get(tensor.name)
    if known is None or (isinstance(tensor, Weight) and known.const_value is not tensor):
        known = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
        )
        graph.register_initializer(known)
    return known


def constant(graph: ir.Graph, name: str, value: object, dtype: type = np.int64) -> ir.Value:
    """A small initializer."""
    return initializer(graph, ir.tensor(np.array(value, dtype), name=name))


class Nodes(list[ir.Node]):
    """Nodes in the order in which they are made, to be put into the graph together; their names begin with `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def add(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Makes a node and returns its output, which has the node's name."""
        (output,) = self.several(op_type, *inputs, name=name, outputs=("",), domain=domain, **attributes)
        return output

    def several(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        outputs: Sequence[str],
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> Sequence[ir.Value]:
        """Makes a node with several outputs, each called after the node and a suffix of `outputs`."""
        name = self.prefix + name
        values = [ir.Value(name=name + suffix) for suffix in outputs]
        self.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name))
        return values

    def matmul_nbits(
        self, x: ir.Value, stored: Sequence[ir.Value], name: str, format: Format, bias: ir.Value | None = None
    ) -> ir.Value:
        """com.microsoft.MatMulNBits over codes [N, blocks, bytes of a block], scales [N, blocks] and zeros, if any.

        Activations are rounded to int8 as well (accuracy_level 4).
        """
        n, blocks = stored[1].shape.numpy()
        inputs: list[ir.Value | None] = [x, *stored]
        if bias is not None:  # behind the zeros and g_idx
            inputs += [*[None] * (4 - len(stored)), bias]
        return self.add(
            "MatMulNBits",
            *inputs,
            name=name,
            domain=MICROSOFT,
            N=n,
            K=blocks * format.block_size,
            bits=format.bits,
            block_size=format.block_size,
            accuracy_level=4,
        )

    def matmul_dequantized(
        self, x: ir.Value, levels: ir.Value, scales: ir.Value, name: str, format: Format
    ) -> ir.Value:
        """MatMul(x, DequantizeLinear(levels [K, N], scales [K / block_size, N])): standard from opset 21 on."""
        weight = self.add(
            "DequantizeLinear", levels, scales, name=f"{name}/DequantizeLinear", axis=0, block_size=format.block_size
        )
        return self.add("MatMul", x, weight, name=f"{name}/MatMul")


def by_block(codes: Weight, format: Format) -> Weight:
    """Codes [N, bytes of a row] as MatMulNBits wants them, [N, blocks of a row, bytes of a block]."""
    n, width = codes.shape.numpy()
    shape = (n, width // format.block_bytes, format.block_bytes)
    return Weight(codes.name, codes.dtype, shape, codes.pieces, codes.parameter, codes.expert)


def replace(
    graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], values: Sequence[tuple[ir.Value, ir.Value]]
) -> None:
    """Puts `new` in the place of `old`; `values` pairs each old value that is used elsewhere with its successor.

    The new nodes stand behind the last of the old. A successor keeps its own name unless the old value is an output of
    the graph.
    """
    graph.insert_after(old[-1], new)
    for before, after in values:
        after.type, after.shape = before.type, before.shape
        if before.is_graph_output():
            after.name, before.name = before.name, None
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def expect(what: str, found: int, wanted: int) -> None:
    """Raises ExportError where a pass matched fewer or more places than the model has."""
    if found != wanted:
        raise ExportError(
            f"the pass for {what} matched {found} places, expected {wanted}; this is a bug of phimoe-onnx, please "
            f"report it"
        )


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value`, None if there are several or it leaves the graph."""
    users = {usage.node for usage in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None
