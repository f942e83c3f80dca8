"""A graph with values of its inside as further outputs: the router's scores and the hidden states.

Protocol Buffers merges messages that lie one behind the other, so nodes and outputs are added by a second ModelProto
behind the file's bytes. The names are those that the exporter gives, exporter/passes/names.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from phimoe_onnx.errors import BundleError
from phimoe_onnx.runtime.ort.protobuf import fields, message

_GRAPH, _NODE, _OUTPUT, _NAME = 7, 1, 12, 1  # fields of ModelProto, GraphProto (two) and ValueInfoProto
_INPUTS, _OUTPUTS, _NODE_NAME, _OP_TYPE = 1, 2, 3, 4  # fields of NodeProto


class Taps(NamedTuple):
    """The names of the values that are outputs now.

    Attributes:
        scores: of each layer, the router's, float32 [..., tokens, experts].
        hidden: what goes into each layer, and what the final norm gives, [..., tokens, hidden_size]; there is one more
            than there are layers.
    """

    scores: list[str]
    hidden: list[str]


class _Node(NamedTuple):
    op_type: str
    inputs: list[str]
    outputs: list[str]


def tap(graph: Path, layers: int) -> tuple[bytes, Taps]:
    """An ONNX file's bytes with the outputs more, and their names.

    The native operator keeps the router's scores to itself, so a product of its own inputs is added for them: the same
    numbers, but for the order of the sums.

    Raises:
        BundleError: the graph has not the nodes that the exporter makes today, or is damaged.
    """
    model = graph.read_bytes()
    added: list[tuple[int, bytes]] = []
    scores, hidden = [], []
    try:
        nodes, outputs = _read(model)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            name = f"{prefix}block_sparse_moe.gate/MatMul"
            if (mixer := nodes.get(f"{prefix}block_sparse_moe.SparseMixerMoE")) is not None:
                x, router, *_ = mixer.inputs
                added += [_node("Transpose", [router], f"{router}.transposed")]
                added += [_node("MatMul", [x, f"{router}.transposed"], name)]
            elif name not in nodes:
                raise KeyError(name)
            scores.append(name)
            hidden.append(_residual(nodes, f"{prefix}input_layernorm"))
        hidden.append(_norm(nodes, "model.norm").outputs[0])
    except KeyError as error:
        raise BundleError(
            f"{graph}: has no node {error.args[0]}, so its inside cannot be read; export the bundle again"
        ) from None
    except (ValueError, IndexError):
        raise BundleError(f"{graph}: is damaged, so no ONNX graph; copy or export the bundle again") from None
    new = [name for name in dict.fromkeys([*scores, *hidden]) if name not in outputs]
    added += [(_OUTPUT, message((_NAME, name))) for name in new]
    return model + message((_GRAPH, message(*added))), Taps(scores, hidden)


def _residual(nodes: dict[str, _Node], name: str) -> str:
    """What a layer norm reads: the sum of all that came before it, which SkipLayerNormalization gives by itself."""
    norm = _norm(nodes, name)
    return norm.outputs[3] if norm.op_type == "SkipLayerNormalization" else norm.inputs[0]


def _norm(nodes: dict[str, _Node], name: str) -> _Node:
    """A layer norm, which a pass has named after its module alone, or tracing after the operator, too."""
    norm = nodes.get(name) or nodes.get(f"{name}/LayerNormalization")
    if norm is None:
        raise KeyError(name)
    return norm


def _node(op_type: str, inputs: list[str], output: str) -> tuple[int, bytes]:
    parts = [(_INPUTS, name) for name in inputs]
    return _NODE, message(*parts, (_OUTPUTS, output), (_NODE_NAME, output), (_OP_TYPE, op_type))


def _read(model: bytes) -> tuple[dict[str, _Node], set[str]]:
    """The main graph's nodes by name, and the names of its outputs."""
    nodes: dict[str, _Node] = {}
    outputs: set[str] = set()
    for start, end in _at(model, 0, len(model), _GRAPH):
        for first, last in _at(model, start, end, _NODE):
            values: dict[int, list[str]] = {_INPUTS: [], _OUTPUTS: [], _NODE_NAME: [""], _OP_TYPE: [""]}
            for number, a, b in fields(model, first, last):
                if number in values:
                    values[number].append(model[a:b].decode())
            nodes[values[_NODE_NAME][-1]] = _Node(values[_OP_TYPE][-1], values[_INPUTS], values[_OUTPUTS])
        for first, last in _at(model, start, end, _OUTPUT):
            outputs.update(model[a:b].decode() for number, a, b in fields(model, first, last) if number == _NAME)
    return nodes, outputs


def _at(data: bytes, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """Where the fields of one number lie in the message at data[start:end]."""
    for found, first, last in fields(data, start, end):
        if found == number:
            yield first, last
