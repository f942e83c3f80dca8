"""Keyword options and prompts of every kind: refused in words of ours where the documentation refuses them, and only
there; the tokens are those that the documentation promises.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phimoe_onnx import PhiMoE
from phimoe_onnx.errors import PhiMoEError
from tests.mutants.inputs import CONVERSATION, NEW_TOKENS, PROMPT, bundles
from tests.mutants.mutator import VALUES, Mutator

DEPTHS = ("refused", "run")
CONTEXT = 128
STRANGE: list[Any] = [
    *VALUES, *map(np.int64, (-1, 0, 3)), np.float32(0.5), np.float64("nan"), np.array(1), np.array([1, 2]),
    np.bool_(True), b"a", bytearray(b"a"), 1j, object(), range(3), {1}, (), ("a",), ("a", ""), ("a", None), [b"a"],
    iter("ab"), "\udcff", -(2**70), 2**70, 10**5000, 1e-46, 1 + 1e-16, np.uint8(7), 127, 124, 128, 10_000,
]  # fmt: skip
LIKELY: dict[str, list[Any]] = {
    "max_new_tokens": [None, 1, 2, 6, np.int64(4), 100, 124, 125],
    "temperature": [None, 0, 0.0, 1e-308, 1e-45, 0.5, 1, 2.0, 1e300, np.float32(0.7)],
    "top_k": [None, 0, 1, 2, 300, 301, 10**6, 2**70, np.int32(5)],
    "top_p": [None, 1, 1.0, 0.5, 1e-9, 1e-320, 0.999999, np.float16(0.5)],
    "min_p": [None, 0, 0.0, 1, 1.0, 0.1, 1e-300],
    "repetition_penalty": [None, 1, 1.0, 1.3, 0.7, 1e30, 1e-30, 1e-45, 2],
    "seed": [None, 0, 1, -1, 2**64, 2**200, np.uint64(3)],
    "stop": [None, "a", "ab", ["a", "t"], ("zzz",), [], "\N{SLIGHTLY SMILING FACE}", "x" * 10_000],
    "logits_processor": [None, lambda ids, logits: logits, lambda ids, logits: -logits],
    "tools": [None, [], [{"type": "function"}], ({"a": 1},)],
}
PROMPTS: list[Any] = [
    PROMPT, tuple(PROMPT), np.array(PROMPT), np.array(PROMPT, np.uint8), np.array([PROMPT, PROMPT]), [PROMPT], "a stop",
    ["a stop", "b"], [PROMPT, "a"], CONVERSATION, [CONVERSATION], tuple(CONVERSATION), "<|user|>\na<|end|>", "a" * 90,
]  # fmt: skip
STRANGE_PROMPTS: list[Any] = [
    "", [], (), [[]], [""], [True], [1.5], [-1], [301], [10**30], ["a", 5], [5, "a"], [None], [["a"]], [[["a"]]], {},
    {"role": "user"}, [{"role": 1, "content": "a"}], [{"content": "a"}], [{"role": "user"}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "tool", "content": "a"}], [*CONVERSATION, 5], [5, *CONVERSATION],
    [{"role": "user", "content": "\ud800"}], [{"role": "\ud800", "content": "a"}], "a" * 100_000, [5] * 128,
    [5] * 127, np.array([1.0]), np.zeros((0,), int), np.zeros((2, 0), int), np.zeros((1, 1, 1), int), np.array(5),
    np.array("a"), np.array(["a"]), np.array([None]), np.array([PROMPT], object), memoryview(b"ab"), Path("a"),
    [b"a"], [bytearray(b"a")], [{}], [{"role": "user", "content": None}], [[5, 6], [5, None]], [set()],
    [np.array(5)], [np.int64(5), np.array(6)],
]  # fmt: skip


def _said(value: Any) -> str:
    try:
        return repr(value)[:300]
    except ValueError:  # an integer of more digits than Python writes
        return f"{{{', '.join(value)}}} with 10**5000" if isinstance(value, dict) else "[10**5000]"


def is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    whole = isinstance(value, int | np.integer) or (
        isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu"
    )
    return whole and not isinstance(value, bool) and least <= int(value) <= most


def is_number(value: Any, least: float, most: float, *, open: bool = False) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool_):
        return False
    value = float(value) if isinstance(value, np.floating) else value
    return least <= value <= most and not (open and value == least)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def are_stops(value: Any) -> bool:
    if isinstance(value, str):
        return is_text(value) and value != ""
    if not isinstance(value, Iterable) or isinstance(value, bytes | bytearray) or getattr(value, "ndim", 1) == 0:
        return False
    return all(is_text(each) and each != "" for each in value)


# what the documentation takes beside None; the prompt has four tokens, and the context 128
TAKEN: dict[str, Callable[[Any], bool]] = {
    "max_new_tokens": lambda value: is_integer(value, 1, CONTEXT - len(PROMPT)),
    "temperature": lambda value: is_number(value, 0, 1.7976931348623157e308),
    "top_k": lambda value: is_integer(value, 0),
    "top_p": lambda value: is_number(value, 0, 1, open=True),
    "min_p": lambda value: is_number(value, 0, 1),
    "repetition_penalty": lambda value: is_number(value, 1e-30, 1e30),
    "seed": is_integer,
    "stop": are_stops,
    "logits_processor": callable,
    "tools": lambda value: isinstance(value, list | tuple) and all(isinstance(tool, Mapping) for tool in value),
}
LOAD: dict[str, tuple[list[Any], Callable[[Any], bool]]] = {
    "device": (["cpu"], lambda value: isinstance(value, str) and value == "cpu"),
    "threads": ([None, 1, 2, np.int64(1)], lambda value: value is None or is_integer(value, 1)),
    "slots": ([1, 2, 64, 10**9, np.int64(3)], lambda value: is_integer(value, 1)),
    "queue": ([0, 1, 2**40, np.int64(3)], lambda value: is_integer(value, 0)),
    "capacity": ([None, 1, 16, 10**9], lambda value: value is None or is_integer(value, 1)),
    "memory_limit": ([None], lambda value: value is None),
    "cuda_graphs": ([False, None], lambda value: value is None or value is False),
}


class Calls:
    """A campaign: `run` makes one call with drawn arguments."""

    def __init__(self, folder: Path) -> None:
        made = bundles(folder)
        self._bundle, self._embed = made / "generate", PhiMoE.load(made / "embed", threads=1)
        self._model = PhiMoE.load(self._bundle, threads=1)
        self._tokens = self._model.generate(PROMPT, max_new_tokens=124).token_ids
        self._calls = [*[self._options] * 8, *[self._prompt] * 5, *[self._chat] * 2, *[self._load] * 2]

    def run(self, mutator: Mutator, folder: Path) -> tuple[str, PhiMoEError | None]:
        """Whether the call was refused or run, and what it was refused with.

        Raises:
            Exception: any is a fault.
        """
        try:
            mutator.pick.choice(self._calls)(mutator)
        except PhiMoEError as error:
            assert len(str(error)) < 1200, f"{len(str(error))} characters: {str(error)[:300]} ..."
            return "refused", error
        # whatever the call was, the next one is as before
        assert self._model.generate(PROMPT, max_new_tokens=3).token_ids == self._tokens[:3]
        return "run", None

    def _options(self, mutator: Mutator) -> None:
        names = mutator.pick.sample(list(LIKELY), mutator.pick.choice((1, 1, 2, 3)))
        likely = mutator.pick.random() < 0.6
        options = {name: mutator.pick.choice(LIKELY[name] if likely else [*LIKELY[name], *STRANGE]) for name in names}
        if mutator.pick.random() < 0.03:
            options[mutator.pick.choice(("max_tokens", "temprature", "\ud800", "x", ""))] = 1
        mutator.said.append(f"generate {_said(options)}")
        # an iterator is read once
        options = {name: list(value) if isinstance(value, type(iter(""))) else value for name, value in options.items()}
        wrong = [
            name for name, value in options.items() if name not in TAKEN or not (value is None or TAKEN[name](value))
        ]
        prompt: Any = CONVERSATION if options.get("tools") is not None else PROMPT
        if prompt is CONVERSATION and options.get("max_new_tokens") is None:
            options["max_new_tokens"] = 4
        streamed = mutator.pick.random() < 0.3
        try:
            if streamed:
                *_, last = self._model.generate(prompt, stream=True, **options)
                result = last.result
            else:
                result = self._model.generate(prompt, **options)
        except PhiMoEError as error:
            fits = prompt is PROMPT or not is_integer(options["max_new_tokens"], 90)
            assert wrong or not fits, f"refused although all is as documented: {error}"
            assert any(name in str(error) for name in (*wrong, *([] if fits else ["max_new_tokens"]))), error
            raise
        assert not wrong, f"took {wrong}"
        if prompt is PROMPT:
            self._check_result(result, options)

    def _check_result(self, result: Any, options: dict[str, Any]) -> None:
        """What the documentation promises of the tokens."""
        limit = options.get("max_new_tokens")
        ids, given = result.token_ids, {name for name, value in options.items() if value is not None}
        assert len(ids) <= (CONTEXT - len(PROMPT) if limit is None else int(limit))
        stops = options.get("stop") or ()
        for stop in [stops] if isinstance(stops, str) else stops:
            assert stop not in result.text
        cold = (options.get("temperature") or 0) < 2.0**-126 or options.get("min_p") == 1
        cold = cold or (options.get("top_k") is not None and int(options["top_k"]) == 1)
        processor = options.get("logits_processor")
        same = processor is None or processor is LIKELY["logits_processor"][1]
        if cold and same and (options.get("repetition_penalty") in (None, 1)) and options.get("top_p", 1) is not None:
            assert ids == self._tokens[: len(ids)], "not the greedy tokens"
        if "seed" in given:
            again = self._model.generate(PROMPT, **options)
            assert again.token_ids == ids, "another text with the same seed"

    def _prompt(self, mutator: Mutator) -> None:
        method = mutator.pick.choice(("generate", "generate", "score", "logits", "embed", "encode"))
        prompt = mutator.pick.choice(PROMPTS if mutator.pick.random() < 0.3 else [*STRANGE_PROMPTS, *STRANGE])
        mutator.said.append(f"{method} {_said(prompt)}")
        if method == "generate":
            results = self._model.generate(prompt, max_new_tokens=NEW_TOKENS)
            batch = isinstance(results, list)
            for result in results if batch else [results]:
                assert len(result.token_ids) <= NEW_TOKENS
            if isinstance(prompt, list | tuple | np.ndarray) and np.array_equal(
                np.asarray(prompt, object), np.array(PROMPT, object)
            ):
                assert results.token_ids == self._tokens[:NEW_TOKENS]
        elif method == "embed":
            vectors = self._embed.embed(prompt)
            assert vectors.shape[-1] == 32
            assert np.isfinite(vectors).all()
        elif method == "encode":
            ids = self._model.encode(prompt)
            assert all(type(id) is int and 0 <= id < 301 for id in ids)
        elif method == "score":
            score = self._model.score(prompt)
            for each in score if isinstance(score, list) else [score]:
                assert (each.logprobs <= 0).all()
                assert len(each.logprobs) == len(each.token_ids) - 1
        else:
            assert np.isfinite(self._model.logits(prompt)).all()

    def _chat(self, mutator: Mutator) -> None:
        system = mutator.pick.choice((None, "be", "", *STRANGE))
        content = mutator.pick.choice(("a", "a stop\n", *STRANGE))
        mutator.said.append(f"chat {_said([system, content])}")
        conversation = self._model.chat(system)
        try:
            conversation.send(content, max_new_tokens=4)
        finally:
            kept = list(conversation.messages)
        assert is_text(content)
        assert [message["role"] for message in kept] == ["system"] * (system is not None) + ["user", "assistant"]
        assert kept[-2]["content"] == content

    def _load(self, mutator: Mutator) -> None:
        names = mutator.pick.sample(list(LOAD), mutator.pick.choice((1, 1, 2)))
        likely = mutator.pick.random() < 0.4
        options = {name: mutator.pick.choice(LOAD[name][0] if likely else [*LOAD[name][0], *STRANGE]) for name in names}
        if "threads" in options and not isinstance(options["threads"], str | bytes | None):
            options["threads"] = 2  # each takes its stack's megabytes, and how many are allowed hangs on the machine
        mutator.said.append(f"load {_said(options)}")
        wrong = [name for name, value in options.items() if not LOAD[name][1](value)]
        try:
            model = PhiMoE.load(self._bundle, **{"threads": 1, **options})
        except PhiMoEError as error:
            assert wrong, f"refused although all is as documented: {error}"
            assert any(name in str(error) for name in wrong), error
            raise
        assert not wrong, f"took {wrong}"
        room = options.get("capacity")
        if room is None or room >= 16:
            assert model.generate(PROMPT, max_new_tokens=3).token_ids == self._tokens[:3]
