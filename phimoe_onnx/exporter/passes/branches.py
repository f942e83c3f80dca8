"""MoE or QMoE -> one If per expert, for ONNX Runtime releases in which those operators are wrong, slow or unknown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.passes._edit import MICROSOFT, constant, expect, initializer, nodes, only_user, op, replace
from phimoe_onnx.exporter.quantize.rtn import Format
from phimoe_onnx.exporter.weights import Weight


class BranchExperts(ir.passes.InPlacePass):
    """Replaces each operator that `FuseExperts` made, with the Mul behind it, by a chain of branches.

    Expert e's branch is taken when a token chose e: NonZero finds those tokens, Gather fetches them, two MatMulNBits
    (Gemm for plain weights) over the expert's own slice of the operator's weights compute them, ScatterND adds them to
    the sum that the chain carries. The slices are the very bytes of the operator's weights, so both graphs can lie over
    one data file.

    Matches exactly `layers` places; the router's nodes that fed the operator alone are dead then.
    """

    def __init__(self, layers: int, format: Format | None) -> None:
        super().__init__()
        self.layers = layers
        self.format = format

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "MoE" if self.format is None else "QMoE", MICROSOFT)
        expect("the fused experts", len(matches), self.layers)
        for node in matches:
            _branch(model.graph, node, self.format)
        return ir.passes.PassResult(model, modified=True)


@dataclass(frozen=True)
class _Experts:
    """What the branches of one layer share.

    Attributes:
        tokens: [T, H].
        choice: int64 [T, 2], like the float32 `weight`.
        stacks: the operator's weights, each [E, ...]: fc1 and fc2, or codes and scales of both.
        intermediate: I.
    """

    graph: ir.Graph
    prefix: str
    tokens: ir.Value
    choice: ir.Value
    weight: ir.Value
    stacks: list[Weight]
    intermediate: int
    format: Format | None


def _branch(graph: ir.Graph, fused: ir.Node, format: Format | None) -> None:
    x, router_probs, *stored = fused.inputs
    scatter = router_probs.producer().inputs[0].producer()
    mul = only_user(fused.outputs[0])
    if scatter.op_type != "ScatterElements" or mul is None:
        raise ExportError(
            f"{fused.name}: is not as FuseExperts leaves it; this is a bug of phimoe-onnx, please report it"
        )
    chosen, weights = scatter.inputs[1], scatter.inputs[2].producer().inputs[0]
    stacks = [value.const_value for value in stored if value is not None]
    number = int(stacks[0].shape[0])
    hidden = int(stacks[-1].shape[1])
    prefix = fused.name.removesuffix(fused.op_type)
    new: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, suffix: str, **attributes: int) -> ir.Value:
        new.append(op(op_type, inputs, prefix + suffix, dict(attributes)))
        return new[-1].outputs[0]

    pair, last = constant(graph, "tokens_by_2", [-1, 2]), constant(graph, "axis_last", [-1])
    choice, weight = add("Reshape", chosen, pair, suffix="choice"), add("Reshape", weights, pair, suffix="weight")
    tokens = add("Reshape", x, constant(graph, f"tokens_by_{hidden}", [-1, hidden]), suffix="tokens")
    experts = _Experts(graph, prefix, tokens, choice, weight, stacks, int(stacks[0].shape[1]) // 2, format)

    numbers = constant(graph, f"experts_below_{number}", list(range(number)))
    matches = add("Equal", add("Unsqueeze", choice, last, suffix="choice/Unsqueeze"), numbers, suffix="matches")
    matches = add("Cast", matches, suffix="matches/Cast", to=ir.DataType.INT32)
    used = add("ReduceMax", matches, constant(graph, "axes_0_1", [0, 1]), suffix="used", keepdims=0)
    used = add("Cast", used, suffix="used/Cast", to=ir.DataType.BOOL)
    new.append(
        op(
            "Split",
            [used],
            f"{prefix}used/Split",
            {"axis": 0, "num_outputs": number},
            outputs=[f".{e}" for e in range(number)],
        )
    )
    total = add(
        "Expand",
        constant(graph, "zero_float", 0.0, np.float32),
        add("Shape", tokens, suffix="tokens/Shape"),
        suffix="zeros",
    )
    for e, condition in enumerate(new[-3].outputs):
        branch = op("If", [condition], f"{prefix}experts.{e}/If")
        skip = op("Identity", [total], f"{prefix}experts.{e}/skipped")
        branch.attributes["then_branch"] = ir.AttrGraph(
            "then_branch", _subgraph(_add_expert(experts, e, total), f"expert_{e}")
        )
        branch.attributes["else_branch"] = ir.AttrGraph("else_branch", _subgraph([skip], f"skip_expert_{e}"))
        new.append(branch)
        total = branch.outputs[0]
    output = add("Reshape", total, add("Shape", x, suffix="x/Shape"), suffix="output")
    replace(graph, [fused, mul], new, [(mul.outputs[0], output)])


def _add_expert(experts: _Experts, e: int, total: ir.Value) -> list[ir.Node]:
    """The nodes that add expert e's share to the total [T, H]; the last one gives the new total."""
    graph, format = experts.graph, experts.format
    prefix = f"{experts.prefix}experts.{e}/"
    axis_0, axis_1 = constant(graph, "axis_0", [0]), constant(graph, "axis_1", [1])
    new: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, suffix: str, **attributes: int) -> ir.Value:
        new.append(op(op_type, inputs, prefix + suffix, dict(attributes)))
        return new[-1].outputs[0]

    def project(a: ir.Value, stacks: list[Weight], suffix: str) -> ir.Value:
        weights = [_slice(stack, e, format) for stack in stacks]
        inputs = [a, *(initializer(graph, weight) for weight in weights)]
        if format is None:
            new.append(op("Gemm", inputs, f"{prefix}{suffix}/Gemm", {"transB": 1}))
        else:
            n, blocks = weights[1].shape.numpy()
            new.append(
                op("MatMulNBits", inputs, f"{prefix}{suffix}/MatMulNBits", format.attributes(n, blocks), MICROSOFT)
            )
        return new[-1].outputs[0]

    here = add("Equal", experts.choice, constant(graph, f"expert_{e}", e), suffix="here")
    kept = add("Where", here, experts.weight, constant(graph, "zero_float", 0.0, np.float32), suffix="here/Where")
    share = add("ReduceSum", kept, axis_1, suffix="share", keepdims=1)
    here = add(
        "ReduceMax",
        add("Cast", here, suffix="here/Cast", to=ir.DataType.INT32),
        axis_1,
        suffix="here/ReduceMax",
        keepdims=0,
    )
    token = add("Squeeze", add("NonZero", here, suffix="NonZero"), axis_0, suffix="token")
    middle, intermediate = len(experts.stacks) // 2, experts.intermediate
    gate_up = project(add("Gather", experts.tokens, token, suffix="Gather"), experts.stacks[:middle], "gate_up_proj")
    pairs = add(
        "Reshape", gate_up, constant(graph, f"tokens_by_{intermediate}_by_2", [-1, intermediate, 2]), suffix="pairs"
    )
    new.append(op("Split", [pairs], f"{prefix}Split", {"axis": -1, "num_outputs": 2}, outputs=(".gate", ".up")))
    gate, up = new[-1].outputs
    silu = add("Mul", gate, add("Sigmoid", gate, suffix="Sigmoid"), suffix="silu")
    act = add("Mul", silu, up, suffix="act")
    act = add("Reshape", act, constant(graph, f"tokens_by_{intermediate}", [-1, intermediate]), suffix="act/Reshape")
    y = project(act, experts.stacks[middle:], "down_proj")
    y = add("Mul", y, add("Gather", share, token, suffix="share/Gather"), suffix="weighted")
    new.append(
        op(
            "ScatterND",
            [total, add("Unsqueeze", token, axis_1, suffix="token/Unsqueeze"), y],
            f"{prefix}sum",
            {"reduction": "add"},
        )
    )
    return new


def _slice(stack: Weight, e: int, format: Format | None) -> Weight:
    """Expert e's matrix of a stack [E, N, width]; codes as MatMulNBits wants them, [N, blocks of a row, bytes of a
    block].
    """
    number, n, width = stack.shape.numpy()
    count = len(stack.pieces) // number
    shape: tuple[int, ...] = (n, width)
    if format is not None and stack.dtype == ir.DataType.UINT8:
        shape = (n, width // format.block_bytes, format.block_bytes)
    return Weight(f"{stack.name}.{e}", stack.dtype, shape, stack.pieces[e * count : (e + 1) * count])


def _subgraph(body: list[ir.Node], name: str) -> ir.Graph:
    return ir.Graph([], [body[-1].outputs[0]], nodes=body, name=name)
