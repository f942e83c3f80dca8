"""spec/sampling.md as a graph, so that on a GPU neither the logits nor the mask leave the device between two steps."""

# mypy: disable-error-code="name-defined"
from __future__ import annotations

import onnx_ir as ir
from onnxscript import BOOL, DOUBLE, FLOAT, INT64, script
from onnxscript import opset18 as op

from phimoe_onnx.exporter.functions import OPSET

FLOAT64 = ir.DataType.DOUBLE.value
WHOLE = ir.DataType.INT64.value


@script(default_opset=op)
def Sampling(
    logits: FLOAT["batch", 1, "vocab_size"],
    attention_mask: INT64["batch", "capacity"],
    seen: BOOL["batch", "vocab_size"],
    greedy: BOOL[1],
    repetition_penalty: FLOAT["batch", 1],
    temperature: DOUBLE["batch", 1],
    top_k: INT64["batch", 1],
    top_p: DOUBLE["batch", 1],
    min_p: DOUBLE["batch", 1],
    u: DOUBLE["batch", 1],
) -> tuple[INT64["batch", 1], INT64["batch", "capacity"], BOOL["batch", "vocab_size"]]:
    """The next token of every row, -1 where the logits are not finite, with the mask and the seen tokens that it adds
    to.

    `seen` says which tokens count for the repetition penalty. `greedy` [1] takes the most likely tokens and ignores
    what comes after the penalty; it lies on the host. A `top_k` of vocab_size and the others' own neutral values are
    off. `u` in [0, 1).
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis = op.Constant(value_ints=[1])
    scores = op.Squeeze(logits, axis)
    nothing = op.Constant(value_float=0.0)
    penalized = op.Where(op.Greater(scores, nothing), scores / repetition_penalty, scores * repetition_penalty)
    scores = op.Where(seen, penalized, scores)
    if greedy:
        _, chosen = op.TopK(scores, axis)  # not ArgMax, whose choice among equals no specification gives
    else:
        vocab_size = op.Shape(scores, start=1)
        largest, order = op.TopK(scores, vocab_size)  # equal scores come by index
        scaled = op.Cast(largest, to=FLOAT64) / temperature
        weights = op.Exp(scaled - op.Slice(scaled, op.Constant(value_ints=[0]), axis, axis))
        rank = op.Range(zero, op.Squeeze(vocab_size), one)
        off = op.Constant(value=ir.serde.to_proto(ir.tensor(0.0, ir.DataType.DOUBLE)))
        weights = op.Where(op.Less(rank, top_k), weights, off)
        sums = op.CumSum(weights, one)
        total = op.Slice(sums, op.Constant(value_ints=[-1]), vocab_size, axis)
        before = op.ReduceSum(op.Cast(op.Less(sums, top_p * total), to=WHOLE), axis)
        likely = op.ReduceSum(op.Cast(op.GreaterOrEqual(weights, min_p), to=WHOLE), axis)
        last = op.Min(before, likely - one)
        reached = op.Less(rank, last) & op.LessOrEqual(sums, u * op.GatherElements(sums, last, axis=1))
        drawn = op.ReduceSum(op.Cast(reached, to=WHOLE), axis)
        chosen = op.GatherElements(order, drawn, axis=1)
    nonsense = op.IsNaN(op.ReduceSum(scores * nothing, axis))
    input_ids = op.Where(nonsense, op.Constant(value_ints=[-1]), chosen)
    length = op.ReduceSum(attention_mask, axis)
    positions = op.Range(zero, op.Squeeze(op.Shape(attention_mask, start=1)), one)
    next_mask = op.Cast(op.LessOrEqual(positions, length), to=WHOLE)
    ids = op.Range(zero, op.Squeeze(op.Shape(seen, start=1)), one)
    now_seen = seen | op.Equal(ids, chosen)
    return input_ids, next_mask, now_seen


def sampling_graph() -> ir.Model:
    """The graph; its outputs are `input_ids` int64 [batch, 1], and `next_attention_mask` and `next_seen` shaped as the
    inputs.
    """
    model = ir.from_proto(Sampling.to_model_proto())
    for value, name in zip(model.graph.outputs, ("input_ids", "next_attention_mask", "next_seen"), strict=True):
        value.name = name
    assert model.opset_imports[""] == OPSET
    return model
