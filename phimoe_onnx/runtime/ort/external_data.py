"""Which files a graph reads its weights from, found in the graph's own bytes before ONNX Runtime opens them.

ONNX Runtime opens whatever file a tensor's external data names, "../x" and absolute paths too. This walks those fields
of onnx.proto3 in which tensors can be, and no others.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

from phimoe_onnx.errors import BundleError
from phimoe_onnx.runtime.ort.protobuf import fields

# For each message the numbers of the fields that lead to tensors, and the messages that these hold.
_FIELDS = {
    "ModelProto": {7: "GraphProto", 25: "FunctionProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
_DEEPEST = 100  # messages inside each other, as Protocol Buffers' own parsers allow


def check_external_data(graph: Path, files: Container[str]) -> None:
    """Raises BundleError where the graph names a file for its weights that is not one of `files`, or is damaged."""
    try:
        data = graph.read_bytes()
    except OSError as error:
        raise BundleError(f"{graph}: cannot be read ({error.strerror}); copy or export the bundle again") from None
    try:
        foreign = next((name for name in locations(data) if name not in files), None)
    except (ValueError, IndexError):
        raise BundleError(f"{graph}: is damaged, so no ONNX graph; copy or export the bundle again") from None
    if foreign is not None:
        raise BundleError(
            f"{graph}: reads weights from {foreign!r}, which manifest.json does not list in files; "
            "export the bundle again"
        )


def locations(model: bytes) -> Iterator[str]:
    """Every location of external data in a serialised ModelProto.

    Raises:
        ValueError, IndexError: the bytes are no message.

    """
    yield from _locations(model, 0, len(model), "ModelProto", _DEEPEST)


def _locations(data: bytes, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    """Those of the message at data[start:end]; most have none, and are passed over by one search for the key's text."""
    if data.find(b"location", start, end) < 0:
        return
    if depth == 0:
        raise ValueError("too many messages inside each other")
    for number, first, last in fields(data, start, end):
        inner = _FIELDS[kind].get(number)
        if inner == "StringStringEntryProto":
            entry = {number: data[a:b].decode() for number, a, b in fields(data, first, last)}
            if entry.get(1) == "location":
                yield entry.get(2, "")
        elif inner:
            yield from _locations(data, first, last, inner, depth - 1)
