"""Writes PhiMoE.Onnx.Tests/tokenizers.json: a small tokenizer.json, changes of it, and what "tokenizers" makes of each.

python embed/csharp/tests/make_tokenizers.py, with tokenizers 0.22 (transformers 4.57's) or newer installed.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

OUT = Path(__file__).parent / "PhiMoE.Onnx.Tests" / "tokenizers.json"
SEED = 13
MUTANTS = 600
TEXTS = [
    "the cat ate the  bread",
    " a<|end|> \n b<s>ab <note> c",
    "été 😀 <0x41>▁x",
    "<|end|><|end|>the<note>the",
    "\u3000the\u00a0\t",
    "",
]
# ids in place of each other, and texts, kinds and numbers that a tokenizer.json has somewhere
VALUES: list[Any] = [None, True, False, 0, 1, 2, 65, 258, 275, 2**31, 2**32, -1, 0.5, 10**30]
VALUES += [
    "",
    " ",
    "a",
    "▁",
    "the",
    "<0x41>",
    "x" * 300,
    "NFC",
    "Lowercase",
    "Prepend",
    "Strip",
    "Replace",
    "Metaspace",
]
VALUES += ["ByteLevel", "Sequence", "Fuse", "ByteFallback", "always", "never", "first", "MergedWithNext", "Isolated"]
VALUES += [
    [],
    {},
    [None],
    ["a", "b"],
    {"String": "a"},
    {"String": ""},
    {"Regex": "a+"},
    {"type": "Fuse"},
    {"type": "NFC"},
]
VALUES += [
    {"type": "Prepend", "prepend": "x"},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "decoders": []},
]
VALUES += [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}]
VALUES += [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}]
VALUES += [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}]


def added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **flags}
    return {"id": token_id, "content": content, **flags}


def base() -> dict[str, Any]:
    """Byte-fallback BPE as PhiMoE checkpoints have it, with a few words."""
    merges: list[list[str]] = []
    for word in ("▁the", "▁cat", "▁ate", "▁bread", "ab", "▁a"):
        made = word[0]
        for letter in word[1:]:
            merges += [[made, letter]] if [made, letter] not in merges else []
            made += letter
    merges += [["a", "t"], ["h", "e"], ["t", "he"], ["▁", "▁"]]
    texts = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *"abcdehrtx"]
    texts += [left + right for left, right in merges]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    size = len(vocabulary)
    special = {"id": "<s>", "ids": [size], "tokens": ["<s>"]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added(0, "<unk>"),
            added(size, "<s>"),
            added(size + 1, "<|end|>", rstrip=True),
            added(size + 2, "<note>", lstrip=True, special=False),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": special},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def pointers(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all values inside a value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [found for key, inner in items for found in ((*path, key), *pointers(inner, (*path, key)))]


def mutate(tokenizer: dict[str, Any], choose: random.Random) -> list[list[Any]]:
    """Changes one or two values of it; returns the steps, ["set", path, value] or ["remove", path]."""
    steps = []
    for _ in range(choose.choice((1, 1, 1, 2))):
        paths = pointers(tokenizer)
        words = [path for path in paths if path[:2] in (("model", "vocab"), ("model", "merges"))]
        rest = [path for path in paths if path[:2] not in (("model", "vocab"), ("model", "merges"))]
        path = choose.choice(words if words and choose.random() < 0.2 else rest)
        parent: Any = tokenizer
        for key in path[:-1]:
            parent = parent[key]
        if choose.random() < 0.15:
            steps.append(["remove", list(path)])
            del parent[path[-1]]
            continue
        old = parent[path[-1]]
        alike = [each for each in VALUES if type(each) is type(old) and each != old]
        value = choose.choice(alike if alike and choose.random() < 0.7 else VALUES)
        if choose.random() < 0.1 and isinstance(parent, dict):
            path = (*path[:-1], "unknown")
        parent[path[-1]] = copy.deepcopy(value)
        steps.append(["set", list(path), value])
    return steps


def results(tokenizer: dict[str, Any]) -> Any:
    """Each text's ids with and without the template, and the text of the latter; null where it is refused."""
    try:
        made = Tokenizer.from_str(json.dumps(tokenizer))
        made.no_truncation()  # as transformers does before every call
        made.no_padding()
        plain = [made.encode(text, add_special_tokens=False).ids for text in TEXTS]
        full = [made.encode(text).ids for text in TEXTS]
        return [plain, full, [made.decode(ids, skip_special_tokens=False) for ids in plain]]
    except BaseException as error:  # the library panics, too, which is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return None


def main() -> None:
    """Draws the changes, without those whose results are random or hide one step behind another's refusal."""
    choose = random.Random(SEED)
    whole = base()
    expected = results(whole)
    mutants = []
    while len(mutants) < MUTANTS:
        changed = copy.deepcopy(whole)
        steps = mutate(changed, choose)
        if changed.get("model") and isinstance(changed["model"], dict) and changed["model"].get("dropout"):
            continue  # random
        found = results(changed)
        if found is None and len(steps) > 1:
            continue  # the refusal of one step would hide what the other does
        mutants.append({"steps": steps, **({} if found == expected else {"results": found})})
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in mutants)
    head = {"tokenizer": whole, "texts": TEXTS, "results": expected}
    body = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())
    OUT.write_text(f'{{\n{body},\n"mutants": [\n{lines}\n]\n}}\n', encoding="utf-8")
    counts = [sum("results" not in each for each in mutants), sum(each.get("results", 0) is None for each in mutants)]
    print(f"{len(mutants)} mutants, {counts[0]} of them the same, {counts[1]} refused")


if __name__ == "__main__":
    main()
