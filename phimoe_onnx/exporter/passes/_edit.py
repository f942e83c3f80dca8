"""Small edits that the passes share: finding, building and replacing nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.weights import Parameter, Weight

MICROSOFT = "com.microsoft"
Attributes = Mapping[str, int | float | str | Sequence[int]]


def nodes(model: ir.Model, op_type: str, domain: str = "") -> list[ir.Node]:
    """The main graph's nodes of one kind, as a list that stays valid while the graph is edited."""
    return [node for node in model.graph if node.op_type == op_type and node.domain == domain]


def parameter(value: ir.Value | None) -> Parameter | None:
    """The checkpoint parameter that `value` is an initializer of, else None."""
    return value.const_value if value is not None and isinstance(value.const_value, Parameter) else None


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name, added where the graph lacks it; a second Weight of the same name is an error."""
    assert tensor.name
    if tensor.name not in graph.initializers or isinstance(tensor, Weight):
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[tensor.name]


def constant(graph: ir.Graph, name: str, value: object, dtype: type = np.int64) -> ir.Value:
    """A small initializer."""
    return initializer(graph, ir.tensor(np.array(value, dtype), name=name))


def op(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Attributes | None = None,
    domain: str = "",
    outputs: Sequence[str] = ("",),
) -> ir.Node:
    """A node whose outputs are called `name` and the suffixes in `outputs`."""
    values = [ir.Value(name=name + suffix) for suffix in outputs]
    return ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)


def replace(
    graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], values: Sequence[tuple[ir.Value, ir.Value]]
) -> None:
    """Puts `new` in the place of `old`; `values` pairs each old value that is used elsewhere with its successor.

    A successor keeps its own name unless the old value is an output of the graph.
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
