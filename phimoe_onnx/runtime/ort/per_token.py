"""Whether a graph computes each token's numbers for itself, found in the graph's own bytes.

Operators that multiply matrices or attend sum in another order for one token than for several, and the last bits
differ. This project's own do not (docs/native.md), and neither do those that move, add or normalise numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from phimoe_onnx.runtime.ort.protobuf import fields

_NATIVE = "phimoe.native"
_MOVES = (
    "Cast Concat Constant ConstantOfShape Equal Expand Gather GatherBlockQuantized Greater GreaterOrEqual Identity "
    "Less LessOrEqual Neg Range Reshape Shape Slice Split Squeeze Transpose Unsqueeze Where"
)
_ADDS = "Add Max Min Mul ReduceSum Sub"  # ReduceSum: of the mask, which is integers
_NORMALISES = "LayerNormalization SkipLayerNormalization"
_KNOWN = frozenset(f"{_MOVES} {_ADDS} {_NORMALISES}".split())


def is_per_token(model: bytes) -> bool:
    """Whether every operator of a serialised ModelProto is known to give a token the same bits alone and beside
    others.
    """
    try:
        return all(domain == _NATIVE or name in _KNOWN for domain, name in _operators(model))
    except (ValueError, IndexError):  # ONNX Runtime takes what this parser does not, so nothing is known
        return False


def _operators(model: bytes) -> Iterator[tuple[str, str]]:
    """Domain and type of every node of the graph; one with a graph inside it, or a function, is ("", "")."""
    for number, first, last in fields(model, 0, len(model)):
        if number == 25:  # ModelProto.functions
            yield "", ""
        if number != 7:  # ModelProto.graph
            continue
        for part, begin, end in fields(model, first, last):
            if part == 1:  # GraphProto.node
                yield _operator(model, begin, end)


def _operator(model: bytes, start: int, end: int) -> tuple[str, str]:
    texts = {4: "", 7: ""}  # NodeProto.op_type, NodeProto.domain
    for number, first, last in fields(model, start, end):
        if number in texts:
            texts[number] = model[first:last].decode()
        if number == 5 and any(
            part in (6, 11) for part, _, _ in fields(model, first, last)
        ):  # AttributeProto.g, graphs
            return "", ""
    return texts[7], texts[4]
