"""The generation loop: prefill each row, then step all rows until each has reached its end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.decoder import Decoder
from phimoe_onnx.runtime.sampling import Choice, Sampling
from phimoe_onnx.runtime.stop import StopStrings
from phimoe_onnx.text.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
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


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    Attributes:
        text: the new text, without special tokens and without the stop string.
        token_ids: the new tokens, with the one that ended the text.
        finish_reason: "eos" (an end token of the model), "stop" (a stop string) or "length" (max_new_tokens).
        prompt_tokens: the length of the prompt.
        first_token_seconds: from the call to the row's first token.
        seconds: from the call to the row's last token.

    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The speed after the first token; 0 where there is no second one."""
        return (len(self.token_ids) - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


@dataclass(frozen=True)
class Piece:
    """One new token of a stream.

    Attributes:
        row: which prompt of the batch; 0 for a single one.
        token_id: the token.
        text: the text that became certain with it; empty while a character is incomplete or a stop string may have
            begun.
        result: on the row's last piece, all of it; else None.

    """

    row: int
    token_id: int
    text: str
    result: Generation | None


PieceStream = Generator[Piece, None, None]


@dataclass(frozen=True)
class Request:
    """One prompt, how many tokens may follow it, and how they are chosen and ended."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str]


def make_request(
    prompt: Sequence[int],
    context: int,
    name: str = "the prompt",
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Request:
    """A request whose options are in range and whose tokens fit a `context` of so many; `name` is the prompt's in
    errors.

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
            f"of "
            f"{context}; at most {context - len(prompt)} new tokens fit"
        )
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise GenerationError("stop holds an empty string, which would end the text before it began")
    seed = secrets.randbits(64) if seed is None else seed
    return Request(prompt, max_new_tokens, Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed), stops)


def generate(decoder: Decoder, tokenizer: Tokenizer, eos: frozenset[int], requests: Sequence[Request]) -> PieceStream:
    """Yields every new token of every request, the rows in turn; `decoder` has a row for each, with room for all its
    tokens.
    """
    start = time.perf_counter()
    active = [_Row(number, request, tokenizer, eos, start) for number, request in enumerate(requests)]
    for place, request in enumerate(requests):
        decoder.prefill(place, request.prompt)
    while True:
        tokens = decoder.choose([row.choice for row in active])
        for row, token in zip(active, tokens, strict=True):
            yield row.add(token)
        for place in reversed(range(len(active))):
            if active[place].finished and len(active) > 1:
                decoder.drop(place)
                active[place] = active[-1]
                active.pop()
        if active[0].finished:
            return
        decoder.step([row.token_ids[-1] for row in active])


class _Row:
    """A request on its way to its end."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer, eos: frozenset[int], start: float) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.seen = set(request.prompt)
        self.finished = False
        self._number = number
        self._eos = eos
        self._start = self._first = start
        self._text = ""
        self._characters = tokenizer.stream(request.prompt)
        self._strings = StopStrings(request.stop)
        # a hidden token has no text that a stop string could be found in
        self._stop_ids = {tokenizer.token_id(stop) for stop in request.stop} & tokenizer.hidden

    @property
    def choice(self) -> Choice:
        """How the row's next token is chosen."""
        return Choice(self.request.sampling, len(self.token_ids), self.seen)

    def add(self, token: int) -> Piece:
        """Takes the row's next token."""
        now = time.perf_counter()
        if not self.token_ids:
            self._first = now
        self.token_ids.append(token)
        self.seen.add(token)
        text, stopped = self._strings.add("" if token in self._eos else self._characters.add(token))
        reason: FinishReason | None = None
        if token in self._eos:
            reason = "eos"
        elif stopped or token in self._stop_ids:
            reason = "stop"
        elif len(self.token_ids) == self.request.max_new_tokens:
            reason = "length"
        if reason is None:
            self._text += text
            return Piece(self._number, token, text, None)
        text += self._strings.finish()
        self._text += text
        self.finished = True
        seconds = (self._first - self._start, now - self._start)
        result = Generation(self._text, self.token_ids, reason, len(self.request.prompt), *seconds)
        return Piece(self._number, token, text, result)
