"""The three seams of modeling.py as ONNX functions in standard operators, with which the traced graph is a whole model.

Each computes exactly what the function of the same name in modeling.py does, in the same order; the letters of the
shapes are those of that file. The bodies are onnxscript: Python syntax that becomes a graph, `for` a Loop and `if` an
If. The portable target inlines Attention and SparseMixer; the experts become branches, which read their weights in
place and not through Gather.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

DOMAIN = "phimoe"
OPSET = 18
_phimoe = Opset(DOMAIN, 1)


@script(_phimoe, default_opset=op)
def Attention(query, key, value, cos, sin, past_key, past_value, visible, kv_heads: int, head_dim: int):  # type: ignore[no-untyped-def]
    """Query [B, S, N * D] and the cache [B, K, P, D] -> [B, S, N * D] and the present cache [B, K, T, D]."""
    one = op.Constant(value_ints=[1])
    dim = op.Reshape(op.Constant(value_int=head_dim), one)
    heads = op.Reshape(op.Constant(value_int=kv_heads), one)
    split = op.Concat(op.Constant(value_ints=[0, 0, -1]), dim, axis=0)
    cos = op.Unsqueeze(cos, one)
    sin = op.Unsqueeze(sin, one)

    query = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    first, second = op.Split(query, axis=-1, num_outputs=2)
    query = op.Concat(first * cos - second * sin, second * cos + first * sin, axis=-1)
    key = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])
    first, second = op.Split(key, axis=-1, num_outputs=2)
    key = op.Concat(first * cos - second * sin, second * cos + first * sin, axis=-1)
    value = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    present_key = op.Concat(past_key, key, axis=2)
    present_value = op.Concat(past_value, value, axis=2)

    # [B, N, S, D] as [B, K, N / K, S, D]: the heads of a group meet their key by broadcasting
    sequence = op.Shape(query, start=2, end=3)
    grouped = op.Concat(op.Constant(value_ints=[0]), heads, op.Constant(value_ints=[-1]), sequence, dim, axis=0)
    two = op.Constant(value_ints=[2])
    scale = op.Sqrt(op.CastLike(dim, query))
    scores = op.MatMul(
        op.Reshape(query, grouped) / scale, op.Transpose(op.Unsqueeze(present_key, two), perm=[0, 1, 2, 4, 3])
    )
    hidden = op.CastLike(op.Constant(value_float=-3.4028234663852886e38), scores)
    scores = op.Where(op.Unsqueeze(visible, two), scores, hidden)
    heads_out = op.MatMul(op.Softmax(scores, axis=-1), op.Unsqueeze(present_value, two))
    heads_out = op.Transpose(heads_out, perm=[0, 3, 1, 2, 4])
    return op.Reshape(heads_out, op.Constant(value_ints=[0, 0, -1])), present_key, present_value


@script(_phimoe, default_opset=op)
def SparseMixer(scores, jitter: float):  # type: ignore[no-untyped-def]
    """Router logits [B, S, E] -> the experts' weights [B, S, 2] and their indices [B, S, 2]."""
    best, chosen = op.TopK(scores, op.Constant(value_ints=[2]), axis=-1)
    last = op.Constant(value_ints=[-1])
    best = op.Unsqueeze(best, last)
    scores_2 = op.Unsqueeze(scores, op.Constant(value_ints=[-2]))
    gap = scores_2 - best
    limit = op.Constant(value_float=jitter) * op.Constant(value_float=-2.0)
    far = op.Less(gap / op.Max(op.Abs(scores_2), best), limit)
    # [2, E] against the first choice: the second round cannot choose the first expert again
    experts = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(scores, start=-1)), op.Constant(value_int=1))
    first = op.Unsqueeze(op.Slice(chosen, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), last), last)
    second_round = op.Unsqueeze(op.Cast(op.Constant(value_ints=[0, 1]), to=9), last)
    taken = op.And(op.Equal(experts, first), second_round)
    zero = op.CastLike(op.Constant(value_float=0.0), scores)
    total = op.ReduceSum(op.Where(op.Or(far, taken), zero, op.Exp(gap)), last, keepdims=0)
    return op.Reciprocal(total), chosen


@script(_phimoe, default_opset=op)
def Experts(x, weights, chosen, gate_up_proj, down_proj):  # type: ignore[no-untyped-def]
    """x [B, S, H] through its chosen experts -> [B, S, H]; the branch of an expert that no token chose is not taken."""
    rows = op.Constant(value_ints=[-1])
    tokens = op.Reshape(x, op.Concat(rows, op.Shape(x, start=2), axis=0))
    pair = op.Constant(value_ints=[-1, 2])
    weight = op.Reshape(weights, pair)
    choice = op.Reshape(chosen, pair)
    zero = op.CastLike(op.Constant(value_float=0.0), weight)
    second = op.Constant(value_ints=[1])
    output = op.Expand(op.CastLike(zero, tokens), op.Shape(tokens))
    number = op.Squeeze(op.Shape(gate_up_proj, start=0, end=1))
    for expert in range(number):
        here = op.Equal(choice, expert)
        share = op.ReduceSum(op.Where(here, weight, zero), second, keepdims=1)
        if op.Cast(op.ReduceMax(op.Cast(here, to=6), keepdims=0), to=9):
            token = op.Squeeze(
                op.NonZero(op.ReduceMax(op.Cast(here, to=6), second, keepdims=0)), op.Constant(value_ints=[0])
            )
            gate, up = op.Split(
                op.Gemm(op.Gather(tokens, token), op.Gather(gate_up_proj, expert), transB=1), axis=-1, num_outputs=2
            )
            y = op.Gemm(gate * op.Sigmoid(gate) * up, op.Gather(down_proj, expert), transB=1)
            y = y * op.CastLike(op.Gather(share, token), y)
            added = op.ScatterND(output, op.Unsqueeze(token, second), y, reduction="add")
        else:
            added = op.Identity(output)
        output = op.Identity(added)
    return op.Reshape(output, op.Shape(x))


FUNCTIONS = tuple(ir.from_proto(function.to_function_proto()) for function in (Attention, SparseMixer, Experts))
