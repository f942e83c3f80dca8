"""The little of Protocol Buffers that an ONNX file needs: which fields a message has, and messages of our own.

The encoding: https://protobuf.dev/programming-guides/encoding/. A message is fields one after the other, each a number,
a wire type and a value.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The number and the range of each field of the message at data[start:end] that is a message or a string; numbers
    are skipped.

    Raises:
        ValueError, IndexError: the bytes are no message.
    """
    place = start
    while place < end:
        key, place = _varint(data, place)
        if key >> 32:  # some parsers drop these bits, and would see another field than this one
            raise ValueError(f"field {key >> 3}")
        number, wire = key >> 3, key & 7
        first = place
        if wire == _VARINT:
            _, place = _varint(data, place)
        elif wire == _BYTES:
            size, first = _varint(data, place)
            place = first + size
        elif wire in (_FIXED64, _FIXED32):
            place += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place > end:
            raise ValueError("a field ends behind its message")
        if wire == _BYTES:
            yield number, first, place


def message(*values: tuple[int, str | bytes]) -> bytes:
    """A message of fields that are messages or strings, each given as its number and its value."""
    encoded = b""
    for number, value in values:
        content = value.encode() if isinstance(value, str) else value
        encoded += _as_varint(number << 3 | _BYTES) + _as_varint(len(content)) + content
    return encoded


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, seven bits a byte, the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")


def _as_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
