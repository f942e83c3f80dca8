"""A request on its way to its end: its tokens, its text, and what its caller is given of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.runtime.logprobs import Logprobs, token_logprobs
from phimoe_onnx.runtime.request import Request
from phimoe_onnx.runtime.sampling import Choice
from phimoe_onnx.runtime.speculation import Account, Speculation
from phimoe_onnx.runtime.stop import StopStrings
from phimoe_onnx.text.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


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
        logprobs: of each of token_ids, where they were asked for; else None.
        drafted: tokens that were run ahead of being chosen (docs/speculation.md).
        accepted: those of them that were chosen then.

    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_seconds: float
    seconds: float
    logprobs: list[Logprobs] | None = None
    drafted: int = 0
    accepted: int = 0

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
        logprobs: the token's, where they were asked for; else None.

    """

    row: int
    token_id: int
    text: str
    result: Generation | None
    logprobs: Logprobs | None = None


class Row:
    """A request on its way to its end.

    Attributes:
        request: what was asked.
        choice: how its next token is chosen.
        deliver: takes each piece, or the error that ends the row.
        session: see `Engine.submit`.
        slot: the row's number in the caches, once it has one.
        pending: the last token while it is not in the cache yet.
        ended: whether nothing more comes.
        speculates: whether drafts are run ahead.
        speculation: its drafts, once it has begun to make any.

    """

    def __init__(
        self,
        number: int,
        request: Request,
        tokenizer: Tokenizer,
        deliver: Callable[[Piece | Exception], None],
        session: object = None,
    ) -> None:
        self.request = request
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] | None = [] if request.logprobs else None
        self._seen = set(request.prompt)
        self.choice = Choice(request.sampling, self._token_ids, self._seen, request.logits_processor)
        self.deliver = deliver
        self.session = session
        self.slot = -1
        self.pending: int | None = None
        self.ended = False
        self.speculates = request.speculate
        self.speculation: Speculation | None = None
        self._number = number
        self._start = self._first = time.perf_counter()
        self._text = ""
        self._tokenizer = tokenizer
        self._characters = tokenizer.stream(request.prompt)
        self._strings = StopStrings(request.stop)
        # a hidden token has no text that a stop string could be found in
        self._stop_ids = {tokenizer.token_id(stop) for stop in request.stop} & tokenizer.hidden

    @property
    def room(self) -> int:
        """The most tokens that the row may come to hold."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def length(self) -> int:
        """The tokens that the row holds, prompt and new."""
        return len(self.request.prompt) + len(self._token_ids)

    def draft(self, account: Account, most: int) -> list[int]:
        """Up to `most` tokens that probably follow the last one, if running them ahead may pay."""
        if not self.speculates:
            return []
        if self.speculation is None:
            self.speculation = Speculation(account, [*self.request.prompt, *self._token_ids])
        left = self.request.max_new_tokens - len(self._token_ids)
        return self.speculation.draft(min(most, left - 1))

    def add(self, token: int, logits: NDArray[np.float32] | None = None) -> Piece:
        """Takes the row's next token, with the logits [V] that it was chosen by where the request wants logprobs."""
        logprobs = None
        if self._logprobs is not None:
            assert logits is not None
            logprobs = token_logprobs(logits, token, self.request.logprobs, self._tokenizer)
            self._logprobs.append(logprobs)
        now = time.perf_counter()
        if not self._token_ids:
            self._first = now
        self._token_ids.append(token)
        self._seen.add(token)
        if self.speculation:
            self.speculation.add(token)
        self.pending = token
        eos = token in self.request.eos
        text, stopped = self._strings.add("" if eos else self._characters.add(token))
        reason: FinishReason | None = None
        if eos:
            reason = "eos"
        elif stopped or token in self._stop_ids:
            reason = "stop"
        elif len(self._token_ids) == self.request.max_new_tokens:
            reason = "length"
        if reason is None:
            self._text += text
            return Piece(self._number, token, text, None, logprobs)
        if not stopped:  # what waited for what might follow it
            last, met = self._strings.add(self._characters.finish())
            text, reason = text + last, "stop" if met else reason
        text += self._strings.finish()
        self._text += text
        seconds = (self._first - self._start, now - self._start)
        counts = (self.speculation.drafted, self.speculation.accepted) if self.speculation else ()
        result = Generation(
            self._text, self._token_ids, reason, len(self.request.prompt), *seconds, self._logprobs, *counts
        )
        return Piece(self._number, token, text, result, logprobs)
