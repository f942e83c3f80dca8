"""QMoE -> one If per expert, for ONNX Runtime releases whose QMoE is slow or refuses `accuracy_level`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from phimoe_onnx.errors import ExportError
from phimoe_onnx.export.passes._edit import MICROSOFT, constant, expect, initializer, nodes, only_user, op, replace
from phimoe_onnx.export.weights import Weight

Attributes = dict[str, int | float | str | list[int]]


class BranchExperts(ir.passes.InPlacePass):
    """Replaces each QMoE that `FuseExperts` made, with the Mul behind it, by a chain of branches.

    Expert e's branch is taken when a token chose e: NonZero finds those tokens, Gather fetches them, two MatMulNBits over
    the expert's own slice of QMoE's weights compute them, ScatterND adds them to the sum that the chain carries. The slices
    are the very bytes of QMoE's weights, so both graphs can lie over one data file.

    Matches exactly `layers` places; the router's nodes that fed QMoE alone are dead then.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "QMoE", MICROSOFT)
        expect("QMoE", len(matches), self.layers)
        for node in matches:
            _branch(model.graph, node)
        return ir.passes.PassResult(model, modified=True)


def _branch(graph: ir.Graph, qmoe: ir.Node) -> None:
    x, router_probs, fc1, fc1_scales, _, fc2, fc2_scales = qmoe.inputs
    scatter = router_probs.producer().inputs[0].producer()
    mul = only_user(qmoe.outputs[0])
    if scatter.op_type != "ScatterElements" or mul is None:
        raise ExportError(f"{qmoe.name}: is not as FuseExperts leaves it; this is a bug of phimoe-onnx, please report it")
    chosen, weights = scatter.inputs[1], scatter.inputs[2].producer().inputs[0]
    experts, hidden, _ = fc2.const_value.shape.numpy()
    intermediate = fc1.const_value.shape[1] // 2
    blob = qmoe.attributes["block_size"].as_int() * qmoe.attributes["expert_weight_bits"].as_int() // 8
    prefix = qmoe.name.removesuffix("QMoE")
    new: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, suffix: str, **attributes: int) -> ir.Value:
        new.append(op(op_type, inputs, prefix + suffix, dict(attributes)))
        return new[-1].outputs[0]

    pair, last = constant(graph, "tokens_by_2", [-1, 2]), constant(graph, "axis_last", [-1])
    choice, weight = add("Reshape", chosen, pair, suffix="choice"), add("Reshape", weights, pair, suffix="weight")
    tokens = add("Reshape", x, constant(graph, f"tokens_by_{hidden}", [-1, hidden]), suffix="tokens")
    numbers = constant(graph, f"experts_0_to_{experts}", list(range(experts)))
    matches = add("Equal", add("Unsqueeze", choice, last, suffix="choice/Unsqueeze"), numbers, suffix="matches")
    matches = add("Cast", matches, suffix="matches/Cast", to=ir.DataType.INT32)
    used = add("ReduceMax", matches, constant(graph, "axes_0_1", [0, 1]), suffix="used", keepdims=0)
    used = add("Cast", used, suffix="used/Cast", to=ir.DataType.BOOL)
    split = op("Split", [used], f"{prefix}used/Split", {"axis": 0, "num_outputs": experts}, outputs=[f".{e}" for e in range(experts)])
    new.append(split)
    total = add("Expand", constant(graph, "zero_float", 0.0, np.float32), add("Shape", tokens, suffix="tokens/Shape"), suffix="zeros")
    for e, condition in enumerate(split.outputs):
        weights_of_e = [initializer(graph, _expert(value.const_value, e, blob)) for value in (fc1, fc1_scales, fc2, fc2_scales)]
        then = _then(graph, f"{prefix}experts.{e}/", e, (tokens, choice, weight, total), weights_of_e, qmoe, intermediate)
        otherwise = op("Identity", [total], f"{prefix}experts.{e}/skipped")
        node = op("If", [condition], f"{prefix}experts.{e}/If")
        node.attributes["then_branch"] = ir.AttrGraph("then_branch", _subgraph(then, f"expert_{e}"))
        node.attributes["else_branch"] = ir.AttrGraph("else_branch", _subgraph([otherwise], f"skip_expert_{e}"))
        new.append(node)
        total = node.outputs[0]
    output = add("Reshape", total, add("Shape", x, suffix="x/Shape"), suffix="output")
    replace(graph, [qmoe, mul], new, [(mul.outputs[0], output)])


def _then(
    graph: ir.Graph,
    prefix: str,
    e: int,
    tokens_choice_weight_total: tuple[ir.Value, ...],
    stored: list[ir.Value],
    qmoe: ir.Node,
    intermediate: int,
) -> list[ir.Node]:
    """The nodes that add expert e's share to the total."""
    tokens, choice, weight, total = tokens_choice_weight_total
    fc1, fc1_scales, fc2, fc2_scales = stored
    axis_0, axis_1 = constant(graph, "axis_0", [0]), constant(graph, "axis_1", [1])
    hidden = int(fc2.shape[0])
    new: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, suffix: str, **attributes: int) -> ir.Value:
        new.append(op(op_type, inputs, prefix + suffix, dict(attributes)))
        return new[-1].outputs[0]

    def matmul(a: ir.Value, codes: ir.Value, scales: ir.Value, n: int, k: int, suffix: str) -> ir.Value:
        bits, block_size = (qmoe.attributes[name].as_int() for name in ("expert_weight_bits", "block_size"))
        attributes: Attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size, "accuracy_level": 4}
        new.append(op("MatMulNBits", [a, codes, scales], prefix + suffix, attributes, MICROSOFT))
        return new[-1].outputs[0]

    here = add("Equal", choice, constant(graph, f"expert_{e}", e), suffix="here")
    kept = add("Where", here, weight, constant(graph, "zero_float", 0.0, np.float32), suffix="here/Where")
    share = add("ReduceSum", kept, axis_1, suffix="share", keepdims=1)
    any_slot = add("ReduceMax", add("Cast", here, suffix="here/Cast", to=ir.DataType.INT32), axis_1, suffix="any", keepdims=0)
    token = add("Squeeze", add("NonZero", any_slot, suffix="NonZero"), axis_0, suffix="token")
    gate_up = matmul(add("Gather", tokens, token, suffix="Gather"), fc1, fc1_scales, 2 * intermediate, hidden, "gate_up_proj")
    pairs = add("Reshape", gate_up, constant(graph, "tokens_by_gate_and_up", [-1, intermediate, 2]), suffix="pairs")
    split = op("Split", [pairs], f"{prefix}Split", {"axis": -1, "num_outputs": 2}, outputs=(".gate", ".up"))
    new.append(split)
    gate, up = split.outputs
    silu = add("Mul", gate, add("Sigmoid", gate, suffix="Sigmoid"), suffix="silu")
    act = add("Mul", silu, up, suffix="act")
    act = add("Reshape", act, constant(graph, f"tokens_by_{intermediate}", [-1, intermediate]), suffix="act/Reshape")
    y = matmul(act, fc2, fc2_scales, hidden, intermediate, "down_proj")
    y = add("Mul", y, add("Gather", share, token, suffix="share/Gather"), suffix="weighted")
    new.append(op("ScatterND", [total, add("Unsqueeze", token, axis_1, suffix="token/Unsqueeze"), y], f"{prefix}sum", {"reduction": "add"}))
    return new


def _expert(stack: Weight, e: int, blob: int) -> Weight:
    """Expert e's matrix of a stack [E, N, width]; codes as MatMulNBits wants them, [N, blocks of a row, blob]."""
    experts, n, width = stack.shape.numpy()
    count = len(stack.pieces) // experts
    shape = (n, width // blob, blob) if stack.dtype == ir.DataType.UINT8 else (n, width)
    return Weight(f"{stack.name}.{e}", stack.dtype, shape, stack.pieces[e * count : (e + 1) * count])


def _subgraph(body: list[ir.Node], name: str) -> ir.Graph:
    return ir.Graph([], [body[-1].outputs[0]], nodes=body, name=name)
