"""One seed, one change: of JSON, text, bytes, protocol buffers and keyword options; and a sentence that says which."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import onnx

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 8, 32, 301, 1.5, 0.0, -0.0, 1e-45, 1e-308, 1e308, 10**9, 2**31 - 1, 2**31, 2**63,
    10**400, float("nan"), float("inf"), "", " ", "1", "cpu", "../x", "a/b", "\x00", "\ud800", "x" * 300, "9" * 5000,
    "\N{SLIGHTLY SMILING FACE}", "a\u0301", "1.29", "float16", "int8", "default", "longrope", "<s>", "<|end|>", "<new>",
    "LlamaTokenizer", "PreTrainedTokenizerFast", "model.data", [], [1], ["a"], [None], [[]], [1, 1], {}, {"a": 1},
    {"content": "<new>", "special": True}, {"content": None}, {"type": "x"},
]  # fmt: skip
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
PIECES = [
    "{{", "}}", "{%", "%}", "{#", "-%}", "{%-", "{% if true %}", "{% endif %}", "{% for m in messages %}",
    "{% endfor %}", "{{ bos_token }}", "{{ eos_token }}", "{{ pad_token }}", "{{ unk_token }}", "{{ tools }}",
    "{{ tools | tojson }}", "{{ documents }}", "{{ messages }}", "{{ messages | tojson(indent=2) }}",
    "{{ messages[0] }}", "{{ messages[-1].content }}", "{{ messages[0]['content'] | trim }}",
    "{{ messages | length }}", "{{ nothing }}", "{{ nothing.more }}", "{{ 1/0 }}", "{{ 'a' * 10**10 }}",
    "{{ 10**10**10 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ raise_exception('no') }}",
    "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as x %}", "{{ ''.__class__ }}",
    "{{ messages.append(1) }}", "{% set ns = namespace(a=1) %}", "{% set messages = messages[1:] %}",
    "{% set x = messages[0] %}{{ x.role }}", "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}", "{% generation %}",
    "{% endgeneration %}", "{% break %}", "{% continue %}", "{{ loop.index }}", "{{ self }}",
    "{{ messages | map(attribute='role') | list }}", "{{ caller() }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "{{ '%s' % messages }}",
    "{{ 'x'.join(['a']) }}", "{{ messages | sort }}", "{{ messages[0].items() | list }}",
    "{{ {'a': 1}.items() | list }}", "{{ [1, 2, 3][::-1] }}", "{{ 'ß' | upper }}", "{{ '<&>' | e }}",
    "{{ namespace }}", "{{ range(3) | list }}", "{{ dict(a=1) }}", "{{ cycler(1) }}", "{{ true and none }}",
    "{{ not none }}", "{{ 1 if add_generation_prompt }}", "{% raw %}", "{% endraw %}", "{% else %}",
    "{{ messages | tojson | safe }}", "{{ 7 // 2 }}", "{{ 2 ** 3 }}", "{{ '\\n' }}", "\n", "  ", "\t", "\r\n",
    "<|user|>", "\x00", "\ufeff", "é", "\N{SLIGHTLY SMILING FACE}", "{{ strftime_now('%Y') }}",
    "{{ messages | string | length }}",
]  # fmt: skip


class Mutator:
    """Draws changes; `said` tells them in order."""

    def __init__(self, seed: object) -> None:
        self.pick = random.Random(str(seed))
        self.said: list[str] = []

    def json(self, value: Any) -> Any:
        """A copy of a JSON value with one to three changes: values put, removed, renamed, copied to another place."""
        root = [copy.deepcopy(value)]
        for _ in range(self.pick.choice((1, 1, 1, 2, 3))):
            self._change(root)
        return root[0]

    def json_file(self, text: str) -> bytes:
        """A JSON file, mutated as a value, seldom as a text or as bytes."""
        way = self.pick.random()
        if way < 0.9:
            return json.dumps(self.json(json.loads(text)), ensure_ascii=self.pick.random() < 0.9).encode(
                "utf-8", "surrogatepass"
            )
        if way < 0.96:
            return self.raw(text.encode())
        strange = [
            "", "null", "[]", "1", '"a"', "{", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "\ufeff" + text,
            text + "x", text.replace("{", '{"vocab_size": ' + "9" * 5000 + ",", 1), "NaN",
            "version https://git-lfs.github.com/spec/v1\n",
            text.replace("{", '{"model_type": "phimoe", "model_type": 1,', 1), text.replace(",", ",,", 1), "\x00",
        ]  # fmt: skip
        number = self.pick.randrange(len(strange))
        self.said.append(f"the strange file {number}")
        return strange[number].encode()

    def text(self, text: str) -> str:
        """A template or another text with one to four changes."""
        for _ in range(self.pick.choice((1, 1, 2, 3, 4))):
            place, end = sorted(self.pick.randrange(len(text) + 1) for _ in range(2))
            end = min(end, place + self.pick.choice((1, 2, 5, 20)))
            piece = self.pick.choice(PIECES)
            action = self.pick.choice(("insert", "insert", "replace", "delete", "begin", "end", "repeat"))
            if action in ("begin", "end"):
                text = piece + text if action == "begin" else text + piece
            elif action == "repeat":
                text = text[:end] + text[place:]
            else:
                piece = "" if action == "delete" else piece
                text = text[:place] + piece + text[place if action == "insert" else end :]
            self.said.append(f"{action} {piece!r} at {place}")
        return text

    def raw(self, data: bytes) -> bytes:
        """Bytes of which some are others, more or fewer."""
        changed = bytearray(data)
        for _ in range(self.pick.choice((1, 1, 1, 2, 4))):
            place = self.pick.randrange(len(changed) + 1)
            action = self.pick.choice(("set", "set", "flip", "number", "insert", "delete", "cut", "repeat"))
            size = self.pick.choice((1, 1, 2, 4, 8, 64))
            if action == "set":
                changed[place : place + 1] = bytes([self.pick.randrange(256)])
            elif action == "flip" and place < len(changed):
                changed[place] ^= 1 << self.pick.randrange(8)
            elif action == "number":
                changed[place : place + 8] = struct.pack("<Q", self.pick.choice(NUMBERS))
            elif action == "insert":
                changed[place:place] = self.pick.randbytes(size)
            elif action == "delete":
                del changed[place : place + size]
            elif action == "cut" and self.pick.random() < 0.3:
                del changed[place:]
            elif action == "repeat":
                changed[place:place] = changed[place : place + size]
            else:
                continue
            self.said.append(f"{action} at byte {place} of {len(data)}")
        return bytes(changed)

    def safetensors(self, data: bytes) -> bytes:
        """A safetensors file: its header as JSON, its length, or any bytes."""
        way = self.pick.random()
        if way > 0.8:
            return self.raw(data)
        (length,) = struct.unpack("<Q", data[:8])
        header, rest = data[8 : 8 + length], data[8 + length :]
        if way > 0.7:
            wrong = self.pick.choice((*NUMBERS, length - 1, length + 1, len(data)))
            self.said.append(f"a header of {wrong} bytes")
            return struct.pack("<Q", wrong) + header + rest
        if way > 0.6:
            place = self.pick.randrange(len(rest) // 4) * 4
            value = self.pick.choice((float("nan"), float("inf"), 1e38, -1.0, 0.0, 1e-45))
            self.said.append(f"{value} at byte {place} of the numbers")
            return data[: 8 + length + place] + struct.pack("<f", value) + rest[place + 4 :]
        header = json.dumps(self.json(json.loads(header))).encode()
        return struct.pack("<Q", len(header)) + header + rest

    def graph(self, data: bytes) -> bytes:
        """An ONNX graph: its fields, whatever message they are in, or any bytes."""
        if self.pick.random() < 0.25:
            return self.raw(data)
        model = onnx.load_model_from_string(data)
        for _ in range(self.pick.choice((1, 1, 1, 2, 3))):
            self._change_field(model)
        return model.SerializeToString()

    def _change(self, root: list[Any]) -> None:
        ways = list(places(root))
        *way, last = self.pick.choice(ways)
        parent = _follow(root, way)
        actions = ["put", "put", "put", "copy", "edit", "edit"] + ["remove", "rename"] * (parent is not root)
        action = self.pick.choice(actions)
        self.said.append(f"{action} {[*way[1:], last]}")
        if action == "remove":
            del parent[last]
        elif action == "rename" and isinstance(parent, dict):
            parent[f"{last}x"] = parent.pop(last)
        elif action == "edit":
            parent[last] = self._edited(parent[last])
            self.said[-1] += f" {parent[last]!r:.60}"
        elif action == "copy":
            *other, place = self.pick.choice(ways)
            self.said[-1] += f" to {[*other[1:], place]}"
            _follow(root, other)[place] = copy.deepcopy(parent[last])
        else:
            parent[last] = copy.deepcopy(self.pick.choice(VALUES))
            self.said[-1] += f" {parent[last]!r:.60}"

    def _edited(self, value: Any) -> Any:
        """A value of the same kind that is a little other."""
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            as_float = float(value) if abs(value) < 1e300 else 0.0
            return self.pick.choice((value + 1, value - 1, value * 2, -value, as_float, str(value), [value]))
        if isinstance(value, str):
            return self.pick.choice(
                (value + "x", value[1:], value.upper(), f" {value}", value[::-1], [value], value * 2)
            )
        if isinstance(value, list):
            mixed = self.pick.sample(value, len(value))
            return self.pick.choice(
                (value[1:], value[::-1], mixed, value * 2, [*value, self.pick.choice(VALUES)], value[:1])
            )
        if isinstance(value, dict):
            return self.pick.choice(
                (dict(reversed(value.items())), value | {"x": self.pick.choice(VALUES)}, list(value))
            )
        return self.pick.choice(VALUES)

    def _change_field(self, model: onnx.ModelProto) -> None:
        message, field = self.pick.choice(list(fields(model)))
        repeated, value = field.is_repeated, getattr(message, field.name)
        action = self.pick.choice(("clear", "change", "change", "repeat", "swap"))
        self.said.append(f"{action} {message.DESCRIPTOR.name}.{field.name} ({getattr(message, 'name', '')!r:.40})")
        if action == "clear" and repeated:
            del value[self.pick.randrange(len(value))]
        elif action == "clear":
            message.ClearField(field.name)
        elif action == "repeat" and repeated:
            value.append(value[self.pick.randrange(len(value))])
        elif action == "swap" and repeated and len(value) > 1:
            a, b = self.pick.sample(range(len(value)), 2)
            items = list(map(copy.deepcopy, value))
            items[a], items[b] = items[b], items[a]
            del value[:]
            value.extend(items)
        elif field.type != field.TYPE_MESSAGE:
            number = self.pick.randrange(len(value)) if repeated else None
            changed = self._other(field, value if number is None else value[number])
            self.said[-1] += f" {changed!r:.60}"
            try:
                if number is None:
                    setattr(message, field.name, changed)
                else:
                    value[number] = changed
            except (ValueError, TypeError, UnicodeError):  # a number that the field cannot hold
                message.ClearField(field.name)

    def _other(self, field: Any, value: Any) -> Any:
        if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            text = self.pick.choice(
                ("", "x", "../x", "/etc/passwd", "model.data", "logits", "Add", "0", "-1", str(2**63))
            )
            other = self.pick.choice((text, value[1:], value + value[:1]))
            return other.encode() if field.type == field.TYPE_BYTES and isinstance(other, str) else other
        if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
            return self.pick.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), value * 2))
        return self.pick.choice((0, 1, -1, 2, value + 1, value - 1, 2**31 - 1, 2**62, -(2**31), 100_000))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside; of a long vocabulary or list, to the first and the last few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) < 64 else items[:8] + items[-8:]:
        yield (*path, key)
        yield from places(inner, (*path, key))


def _follow(root: Any, way: list[Any]) -> Any:
    for key in way:
        root = root[key]
    return root


def fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every field that is set, with its message, however deep."""
    for field, value in message.ListFields():
        yield message, field
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield from fields(inner)
