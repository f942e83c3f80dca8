"""What is asked of the engine: a prompt, how many tokens may follow it, and how they are chosen and ended."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.sampling import LogitsProcessor, Sampling

DEFAULT_NEW_TOKENS = 1024  # where max_new_tokens is not given


class Options(TypedDict, total=False):
    """The options of `PhiMoE.generate`, which says what they mean."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    logits_processor: LogitsProcessor | None


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

    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    eos: frozenset[int]
    logits_processor: LogitsProcessor | None = None


def make_request(
    prompt: Sequence[int],
    context: int,
    name: str = "the prompt",
    eos: frozenset[int] = frozenset(),
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    logits_processor: LogitsProcessor | None = None,
) -> Request:
    """A request whose options are in range and whose tokens fit a `context` of so many.

    Args:
        prompt: token ids.
        context: the most tokens, prompt and new.
        name: the prompt's in errors.
        eos: the tokens that end a text; none by default.
        max_new_tokens: this and the rest: see `PhiMoE.generate`.

    Raises:
        GenerationError: an option is out of range, or the prompt and the new tokens do not fit the context.

    """
    if len(prompt) >= context:
        raise GenerationError(
            f"{name} has {len(prompt)} tokens, which leaves no room in the context of {context}; shorten it"
        )
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, context - len(prompt))
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    if len(prompt) + max_new_tokens > context:
        raise GenerationError(
            f"{name} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, together more than the context "
            f"of {context}; at most {context - len(prompt)} new tokens fit"
        )
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise GenerationError("stop holds an empty string, which would end the text before it began")
    seed = secrets.randbits(64) if seed is None else seed
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    return Request(prompt, max_new_tokens, sampling, stops, eos, logits_processor)
