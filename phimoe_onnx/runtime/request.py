"""What is asked of the engine: a prompt, how many tokens may follow it, and how they are chosen and ended."""

from __future__ import annotations

import difflib
import numbers
import operator
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from phimoe_onnx.errors import GenerationError, brief
from phimoe_onnx.runtime.logprobs import MOST_LOGPROBS
from phimoe_onnx.runtime.sampling import LogitsProcessor, Sampling
from phimoe_onnx.text.template import Tools
from phimoe_onnx.text.tokenizer import check_characters

DEFAULT_NEW_TOKENS = 1024  # where max_new_tokens is not given


class Options(TypedDict, total=False):
    """The options of `PhiMoE.generate`, which says what they mean; None is as if the option were not given."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logits_processor: LogitsProcessor | None
    logprobs: int | None
    speculate: bool | None
    tools: Tools | None


@dataclass(frozen=True)
class Request:
    """A prompt and its options.

    Attributes:
        prompt: token ids.
        max_new_tokens: how many may follow it.
        sampling: how they are chosen.
        stop: strings that end the text.
        eos: tokens that end it.
        logits_processor: see `sampling.Choice`.
        logprobs: how many alternatives each new token comes with; 0 is none, and no log-probability either.
        speculate: whether drafts are run ahead: speculation.py.

    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    eos: frozenset[int]
    logits_processor: LogitsProcessor | None = None
    logprobs: int = 0
    speculate: bool = False


def make_request(
    prompt: Sequence[int],
    context: int,
    name: str = "the prompt",
    eos: frozenset[int] = frozenset(),
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    logits_processor: LogitsProcessor | None = None,
    logprobs: int | None = None,
    speculate: bool | None = None,
) -> Request:
    """A request whose options are in range and whose tokens fit a `context` of so many.

    Args:
        prompt: token ids.
        context: the most tokens, prompt and new.
        name: the prompt's in errors.
        eos: the tokens that end a text; none by default.
        max_new_tokens: this and the rest: see `PhiMoE.generate`.

    Raises:
        GenerationError: an option is out of range, an id is negative, or the prompt and the new tokens do not fit the
            context.

    """
    if (lowest := min(prompt, default=0)) < 0:  # the decoder knows the highest
        raise GenerationError(f"{name} holds {lowest}, expected token ids from 0")
    if len(prompt) >= context:
        raise GenerationError(
            f"{name} has {len(prompt)} tokens, which leaves no room in the context of {context}; shorten it"
        )
    max_new_tokens = None if max_new_tokens is None else integer("max_new_tokens", max_new_tokens)
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, context - len(prompt))
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens is {brief(max_new_tokens)}, expected 1 or more")
    if len(prompt) + max_new_tokens > context:
        raise GenerationError(
            f"{name} has {len(prompt)} tokens and max_new_tokens is {brief(max_new_tokens)}, together more than the "
            f"context of {context}; at most {context - len(prompt)} new tokens fit"
        )
    sampling = Sampling(
        0.0 if temperature is None else _number("temperature", temperature),
        0 if top_k is None else integer("top_k", top_k),
        1.0 if top_p is None else _number("top_p", top_p),
        0.0 if min_p is None else _number("min_p", min_p),
        1.0 if repetition_penalty is None else _number("repetition_penalty", repetition_penalty),
        secrets.randbits(64) if seed is None else integer("seed", seed),
    )
    if logits_processor is not None and not callable(logits_processor):
        raise GenerationError(f"logits_processor is {brief(logits_processor)}, expected a function")
    logprobs = 0 if logprobs is None else integer("logprobs", logprobs)
    if not 0 <= logprobs <= MOST_LOGPROBS:
        raise GenerationError(f"logprobs is {logprobs}, expected 0 (off) to {MOST_LOGPROBS}")
    if not isinstance(speculate, bool | None):
        raise GenerationError(f"speculate is {brief(speculate)}, expected True or False")
    return Request(
        prompt, max_new_tokens, sampling, _stops(stop), eos, logits_processor, logprobs, speculate=bool(speculate)
    )


def check_names(names: Iterable[str]) -> None:
    """Refuses names that are none of an option's.

    Raises:
        GenerationError: an unknown name, with the one that is nearest.

    """
    known = Options.__optional_keys__
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known ones are {', '.join(sorted(known))}"
            raise GenerationError(f"{name} is no option; {hint}")


def integer(name: str, value: Any) -> int:
    """The value of the option `name` as an int, of whatever type of integers it is.

    Raises:
        GenerationError: it is no integer.

    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise GenerationError(f"{name} is {brief(value)}, expected an integer") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise GenerationError(f"{name} is {brief(value)}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise GenerationError(f"{name} has more digits than a float holds, expected a number") from None


def _stops(stop: Any) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if isinstance(stops, bytes) or not isinstance(stops, Iterable) or getattr(stops, "ndim", 1) == 0:
        raise GenerationError(f"stop is {brief(stop)}, expected a string or several")
    stops = tuple(stops)
    for each in stops:
        if not isinstance(each, str):
            raise GenerationError(f"stop holds {brief(each)}, expected strings")
        if not each:
            raise GenerationError("stop holds an empty string, which would end the text before it began")
        check_characters(each, "stop")
    return stops
