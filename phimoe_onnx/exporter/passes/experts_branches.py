"""The experts -> one If per expert, for ONNX Runtime releases in which MoE and QMoE are wrong, slow or unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import MICROSOFT, Nodes, by_block, constant, expect, initializer, nodes, replace
from phimoe_onnx.exporter.passes.experts_stored import ExpertsWeights
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import Recipe
from phimoe_onnx.exporter.weights import Weight


class BranchExperts(ir.passes.InPlacePass):
    """Replaces each `phimoe::Experts` that `StoreExperts` has been at by a chain of branches.

    1. Expert e's branch is taken when a token chose e: NonZero finds those tokens, Gather fetches them, two
       MatMulNBits compute them (Gemm for plain weights, MatMul behind a DequantizeLinear in standard operators), and
       ScatterND adds them to the sum that the chain carries.
    2. A matrix is the expert's own slice of the stored stack, the very bytes that the fused operator reads, so both
       graphs can lie over one data file.

    Matches exactly `num_hidden_layers` places.
    """

    def __init__(self, config: PhiMoEConfig, recipe: Recipe) -> None:
        super().__init__()
        self.config = config
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "Experts", DOMAIN)
        expect("the experts", len(matches), self.config.num_hidden_layers)
        for node in matches:
            _branch(model.graph, node, self.config, self.recipe)
        if self.recipe.target.blocks == "MatMulNBits" and any(
            isinstance(form, Format) for forms in self.recipe.forms.values() for form in forms
        ):
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified=bool(matches))


@dataclass(frozen=True)
class _Layer:
    """What the branches of one layer share.

    Attributes:
        stored: the experts' weights.
        tokens: [T, H].
        choice: int64 [T, 2], like the float32 `weight`.
    """

    graph: ir.Graph
    config: PhiMoEConfig
    recipe: Recipe
    stored: ExpertsWeights
    tokens: ir.Value
    choice: ir.Value
    weight: ir.Value


def _branch(graph: ir.Graph, experts: ir.Node, config: PhiMoEConfig, recipe: Recipe) -> None:
    x, weights, chosen, *stacks = experts.inputs
    stored = ExpertsWeights.of(experts)
    number, hidden = config.num_local_experts, config.hidden_size
    new = Nodes(stored.prefix)
    pair, last = constant(graph, "tokens_by_2", [-1, 2]), constant(graph, "axis_last", [-1])
    choice, weight = new.add("Reshape", chosen, pair, name="choice"), new.add("Reshape", weights, pair, name="weight")
    tokens = new.add("Reshape", x, constant(graph, f"tokens_by_{hidden}", [-1, hidden]), name="tokens")
    layer = _Layer(graph, config, recipe, stored, tokens, choice, weight)

    numbers = constant(graph, f"experts_below_{number}", list(range(number)))
    matches = new.add("Equal", new.add("Unsqueeze", choice, last, name="choice/Unsqueeze"), numbers, name="matches")
    matches = new.add("Cast", matches, name="matches/Cast", to=ir.DataType.INT32)
    used = new.add("ReduceMax", matches, constant(graph, "axes_0_1", [0, 1]), name="used", keepdims=0)
    used = new.add("Cast", used, name="used/Cast", to=ir.DataType.BOOL)
    suffixes = [f".{e}" for e in range(number)]
    conditions = new.several("Split", used, name="used/Split", outputs=suffixes, axis=0, num_outputs=number)
    zero = constant(graph, "zero_float", 0.0, np.float32)
    total = new.add("Expand", zero, new.add("Shape", tokens, name="tokens/Shape"), name="zeros")
    for e, condition in enumerate(conditions):
        skipped = Nodes(new.prefix)
        skipped.add("Identity", total, name=f"experts.{e}/skipped")
        own: list[ir.Value] = []
        added = _add_expert(layer, e, total, own)
        total = new.add("If", condition, name=f"experts.{e}/If")
        branch = new[-1]
        branch.attributes["then_branch"] = ir.AttrGraph("then_branch", _subgraph(added, f"expert_{e}", own))
        branch.attributes["else_branch"] = ir.AttrGraph("else_branch", _subgraph(skipped, f"skip_expert_{e}"))
    output = new.add("Reshape", total, new.add("Shape", x, name="x/Shape"), name="output")
    replace(graph, [experts], new, [(experts.outputs[0], output)])
    for value in stacks:
        if not value.uses():  # its name is a branch's now, or nobody's
            del graph.initializers[value.name]


def _add_expert(layer: _Layer, e: int, total: ir.Value, own: list[ir.Value]) -> Nodes:
    """The nodes that add expert e's share to the total [T, H]; the last one gives the new total.

    What only the branch itself may hold is added to `own`.
    """
    graph, intermediate = layer.graph, layer.config.intermediate_size
    axis_0, axis_1 = constant(graph, "axis_0", [0]), constant(graph, "axis_1", [1])
    new = Nodes(f"{layer.stored.prefix}experts.{e}/")
    here = new.add("Equal", layer.choice, constant(graph, f"expert_{e}", e), name="here")
    zero = constant(graph, "zero_float", 0.0, np.float32)
    kept = new.add("Where", here, layer.weight, zero, name="here/Where")
    share = new.add("ReduceSum", kept, axis_1, name="share", keepdims=1)
    here = new.add("Cast", here, name="here/Cast", to=ir.DataType.INT32)
    here = new.add("ReduceMax", here, axis_1, name="here/ReduceMax", keepdims=0)
    token = new.add("Squeeze", new.add("NonZero", here, name="NonZero"), axis_0, name="token")
    gathered = new.add("Gather", layer.tokens, token, name="Gather")
    gate_up = _project(layer, new, gathered, layer.stored.gate_up, e, "gate_up_proj", own)
    by_pair = constant(graph, f"tokens_by_{intermediate}_by_2", [-1, intermediate, 2])
    pairs = new.add("Reshape", gate_up, by_pair, name="pairs")
    gate, up = new.several("Split", pairs, name="Split", outputs=(".gate", ".up"), axis=-1, num_outputs=2)
    silu = new.add("Mul", gate, new.add("Sigmoid", gate, name="Sigmoid"), name="silu")
    act = new.add("Mul", silu, up, name="act")
    by_token = constant(graph, f"tokens_by_{intermediate}", [-1, intermediate])
    act = new.add("Reshape", act, by_token, name="act/Reshape")
    y = _project(layer, new, act, layer.stored.down, e, "down_proj", own)
    y = new.add("Mul", y, new.add("Gather", share, token, name="share/Gather"), name="weighted")
    index = new.add("Unsqueeze", token, axis_1, name="token/Unsqueeze")
    new.add("ScatterND", total, index, y, name="sum", reduction="add")
    return new


def _project(
    layer: _Layer, new: Nodes, a: ir.Value, stored: tuple[Weight, ...], e: int, name: str, own: list[ir.Value]
) -> ir.Value:
    """a [t, K] times the matrix [N, K] of expert e."""
    form = layer.recipe.form(stored[0].parameter, e)
    weights = [_slice(weight, e) for weight in stored if weight.expert in (None, e)]
    if isinstance(form, Format) and layer.recipe.target.blocks == "DequantizeLinear":
        # ONNX Runtime makes MatMulNBits of the two nodes, and looks for the weights beside them
        levels, scales = (
            ir.Value(name=weight.name, type=ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight)
            for weight in weights
        )
        own += [levels, scales]
        return new.matmul_dequantized(a, levels, scales, name, form)
    if isinstance(form, Format):
        if stored[0].expert is None:
            weights[0] = by_block(weights[0], form)
        inputs = [initializer(layer.graph, weight) for weight in weights]
        return new.matmul_nbits(a, inputs, f"{name}/MatMulNBits", form)
    (weight,) = weights
    return new.add("Gemm", a, initializer(layer.graph, weight), name=f"{name}/Gemm", transB=1)


def _slice(weight: Weight, e: int) -> Weight:
    """Expert e's matrix of a stack [E, N, width]; a matrix of its own as it is."""
    if weight.expert is not None:
        return weight
    number, *shape = weight.shape.numpy()
    count = len(weight.pieces) // number
    pieces = weight.pieces[e * count : (e + 1) * count]
    return Weight(f"{weight.name}.{e}", weight.dtype, shape, pieces, weight.parameter, e)


def _subgraph(body: Nodes, name: str, initializers: Sequence[ir.Value] = ()) -> ir.Graph:
    return ir.Graph([], [body[-1].outputs[0]], nodes=body, initializers=initializers, name=name)
