"""Attention -> GroupQueryAttention, with Q, K and V packed into one projection."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from phimoe_onnx import bundle, modeling
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import (
    MICROSOFT,
    NATIVE,
    Nodes,
    constant,
    expect,
    initializer,
    nodes,
    parameter,
    replace,
)
from phimoe_onnx.exporter.rope import short_rows
from phimoe_onnx.exporter.weights import FLOATS, Parameter, Weight, job_piece, stacked


class FuseAttention(ir.passes.InPlacePass):
    """Replaces each `phimoe::Attention` and the three projections before it.

    1. The projections MatMul(x, Transpose(W)), each with or without an Add of a bias, become one with the rows of W_q,
       W_k and W_v (and the biases) below each other.
    2. Attention becomes com.microsoft.GroupQueryAttention, or phimoe.native.Attention in its place, with rope inside,
       over tables of cos and sin that hold a row per position. With longrope the rows of the short factors come first
       and those of the long factors after them, and `position_ids` point into one or the other by the length of each
       row of the batch. In a first prompt of several rows GroupQueryAttention takes row 0's choice for all (release
       1.32), so rows on both sides of the boundary are to be run alone.
    3. Without cache inputs there are only such prompts, so that with longrope com.microsoft.RotaryEmbedding, which
       reads each row's own `position_ids`, turns Q and K before the operator. Its present outputs stay although nothing
       reads them: without them the operator takes memory for all pairs of positions (ONNX Runtime 1.29 to 1.32).
    4. So it does in steps with longrope where the operator may not rotate (`Target.rotates`).
    5. What fed Attention alone (cos, sin and the mask computed by the traced graph) is dead then, for a later pass to
       drop.

    Matches exactly `num_hidden_layers` places.

    Args:
        config: the model's shape.
        operator_rotates: whether the operator may rotate in a step with longrope.
        native: whether it is phimoe.native.Attention, which takes and gives the same.
    """

    def __init__(self, config: PhiMoEConfig, operator_rotates: bool = True, native: bool = False) -> None:
        super().__init__()
        self.config = config
        self.operator_rotates = operator_rotates
        self.op_type, self.domain = ("Attention", NATIVE) if native else ("GroupQueryAttention", MICROSOFT)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "Attention", DOMAIN)
        expect("attention", len(matches), self.config.num_hidden_layers)
        shared = _shared_inputs(model.graph, self.config, matches[0].inputs[3].dtype, first=model.graph[0])
        for node in matches:
            self._fuse(model.graph, node, shared)
        model.opset_imports[MICROSOFT] = model.opset_imports[self.domain] = 1
        return ir.passes.PassResult(model, modified=bool(matches))

    def _fuse(self, graph: ir.Graph, attention: ir.Node, shared: list[ir.Value | None]) -> None:
        projections = [_projection(value) for value in attention.inputs[:3]]
        prefix = projections[0].weight.name.removesuffix("q_proj.weight")
        new = Nodes(prefix)
        qkv = _pack(graph, new, projections)
        attributes: dict[str, int] = {
            "num_heads": self.config.num_attention_heads,
            "kv_num_heads": self.config.num_key_value_heads,
            "do_rotary": 1,
        }
        if self.config.window is not None:
            attributes["local_window_size"] = self.config.window
        seqlens_k, total, cos, sin, position_ids = shared
        past_key, past_value = attention.inputs[5:7]
        if not past_key.is_graph_input():
            past_key = past_value = None
        if position_ids is not None and (past_key is None or not self.operator_rotates):
            qkv = self._rotate(graph, new, qkv, position_ids, cos, sin)
            attributes["do_rotary"], position_ids, cos, sin = 0, None, None, None
        inputs = [qkv, None, None, past_key, past_value, seqlens_k, total, cos, sin, position_ids]
        outputs = new.several(
            self.op_type,
            *inputs,
            name=self.op_type,
            outputs=("", "/present_key", "/present_value"),
            domain=self.domain,
            **attributes,
        )
        old = [node for p in projections for node in p.nodes] + [attention]
        replace(graph, old, new, list(zip(attention.outputs, outputs, strict=True)))

    def _rotate(
        self,
        graph: ir.Graph,
        new: Nodes,
        qkv: ir.Value,
        position_ids: ir.Value,
        cos: ir.Value | None,
        sin: ir.Value | None,
    ) -> ir.Value:
        """Turns Q and K inside the packed projection."""
        kv = self.config.num_key_value_heads * self.config.head_dim
        widths = constant(graph, "qk_and_v", [self.config.num_attention_heads * self.config.head_dim + kv, kv])
        qk, v = new.several("Split", qkv, widths, name="qkv_proj/Split", outputs=("/qk", "/v"), axis=-1)
        rotated = new.add("RotaryEmbedding", qk, position_ids, cos, sin, name="RotaryEmbedding", domain=MICROSOFT)
        return new.add("Concat", rotated, v, name="qkv_proj/Concat", axis=-1)


def _pack(graph: ir.Graph, new: Nodes, projections: list[_Projection]) -> ir.Value:
    """One projection of x with the rows of all of them."""
    name = f"{new.prefix}qkv_proj"
    weight = initializer(graph, stacked(f"{name}.weight", [p.weight for p in projections]))
    transposed = new.add("Transpose", weight, name="qkv_proj/Transpose", perm=[1, 0])
    qkv = new.add("MatMul", projections[0].x, transposed, name="qkv_proj/MatMul")
    if biases := [p.bias for p in projections if p.bias is not None]:
        qkv = new.add("Add", qkv, initializer(graph, stacked(f"{name}.bias", biases)), name="qkv_proj/Add")
    return qkv


@dataclass(frozen=True)
class _Projection:
    x: ir.Value
    weight: Parameter
    bias: Parameter | None
    nodes: list[ir.Node]  # in graph order


def _projection(value: ir.Value) -> _Projection:
    """MatMul(x, Transpose(W)), with or without an Add of a bias, that computes `value`."""
    matched: list[ir.Node] = []
    bias = None
    node = value.producer()
    if node is not None and node.op_type == "Add":
        bias = parameter(node.inputs[1])
        matched.append(node)
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "MatMul":
        transpose = node.inputs[1].producer()
        weight = parameter(transpose.inputs[0]) if transpose is not None and transpose.op_type == "Transpose" else None
        if weight is not None:
            return _Projection(node.inputs[0], weight, bias, [transpose, node, *matched])
    raise ExportError(
        f"{value.name}: expected a projection before attention; this is a bug of phimoe-onnx, please report it"
    )


def _shared_inputs(graph: ir.Graph, config: PhiMoEConfig, dtype: ir.DataType, first: ir.Node) -> list[ir.Value | None]:
    """seqlens_k, total_sequence_length, cos_cache, sin_cache and position_ids, if there are any, the same for every
    layer.
    """
    named = {value.name: value for value in graph.inputs}
    mask = named[bundle.ATTENTION_MASK]
    new = Nodes()
    add = new.add
    zero, one, axis = constant(graph, "zero", 0), constant(graph, "one", 1), constant(graph, "axis_1", [1])
    lengths = add("ReduceSum", mask, axis, name="lengths", keepdims=1)  # [B, 1]: each row's tokens, cached and new
    last = add("Sub", add("Squeeze", lengths, axis, name="lengths/Squeeze"), one, name="lengths/Sub")
    seqlens_k = add("Cast", last, name="seqlens_k", to=ir.DataType.INT32)
    width = add("Squeeze", add("Shape", mask, name="total/Shape", start=1), name="total/Squeeze")
    total = add("Cast", width, name="total_sequence_length", to=ir.DataType.INT32)
    position_ids = None
    if config.longrope:  # otherwise the operator's own positions are right
        new_tokens = add("Shape", named[bundle.INPUT_IDS], name="sequence/Shape", start=1)
        steps = add("Range", zero, add("Squeeze", new_tokens, name="sequence/Squeeze"), one, name="steps")
        # lengths - new tokens, by way of the last step: on a GPU that is where the lengths are, and a Shape's output is
        # not
        last_step = add("Gather", steps, constant(graph, "last_index", [-1]), name="steps/Gather")
        before = add("Sub", add("Sub", lengths, one, name="last"), last_step, name="past/Sub")
        past = add("Max", before, zero, name="past")  # 0 for a padded first prompt
        positions = add("Add", past, steps, name="positions")
        rope_length = lengths
        if bundle.ROPE_LENGTH in named:
            rope_length = add("Max", lengths, named[bundle.ROPE_LENGTH], name="rope_length/Max")
        boundary = constant(graph, "original_max_position_embeddings", config.longrope.original_max_position_embeddings)
        is_long = add("Greater", rope_length, boundary, name="rope_is_long")
        beyond = add("Add", positions, constant(graph, "long_rope_rows", short_rows(config)), name="long_positions")
        position_ids = add("Where", is_long, beyond, positions, name="position_ids")
    graph.insert_before(first, new)
    cos, sin = (initializer(graph, table) for table in rope_tables(config, dtype))
    return [seqlens_k, total, cos, sin, position_ids]


def rope_tables(config: PhiMoEConfig, dtype: ir.DataType) -> tuple[Weight, Weight]:
    """cos and sin, each [rows, head_dim / 2]: max_position_embeddings rows, with longrope the short factors' rows
    before.
    """
    longest = config.max_position_embeddings
    sections = [(short_rows(config), 1), (longest, np.iinfo(np.int64).max)] if config.longrope else [(longest, 1)]
    half = config.head_dim // 2

    def table(function: np.ufunc, rows: int, length: int) -> torch.Tensor:
        angles, mscale = modeling.Rope(config).angles(torch.arange(rows)[None], torch.tensor([[length]]))
        # numpy's, in float64: in a new thread PyTorch's, which are MKL's, now and then give but four digits (PyTorch
        # 2.13)
        values = torch.from_numpy(function(angles[0].double().numpy())).float()
        return (values * mscale.flatten()).to(FLOATS[dtype])

    def weight(name: str, function: np.ufunc) -> Weight:
        pieces = [
            job_piece(partial(table, function, rows, length), (rows, half), dtype, -1) for rows, length in sections
        ]
        return Weight(name, dtype, (sum(rows for rows, _ in sections), half), pieces)

    return weight("cos_cache", np.cos), weight("sin_cache", np.sin)
