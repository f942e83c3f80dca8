"""A conversation of several turns that keeps its slot in the engine, so that a turn computes only what is new."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Literal, Unpack, overload

from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.engine import Engine
from phimoe_onnx.runtime.generate import PieceStream, generate
from phimoe_onnx.runtime.request import Options, Request
from phimoe_onnx.runtime.row import Generation
from phimoe_onnx.text.template import Message


class Conversation:
    """What was said so far; `PhiMoE.chat` makes one.

    Every turn renders the whole conversation, and the engine keeps the longest prefix of it that is cached already. The
    slot stays the conversation's from turn to turn, unless the engine is full and others need it.

    A turn at a time: `send` raises GenerationError while another answer is on its way, in any thread.

    Attributes:
        messages: the turns, each {"role": ..., "content": ...}; may be edited between turns.

    """

    def __init__(self, engine: Engine, make_request: Callable[..., Request], system: str | None = None) -> None:
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._engine = engine
        self._make_request = make_request  # PhiMoE.request
        self._turn = threading.Lock()
        self._session = object()
        weakref.finalize(self, engine.forget, self._session).atexit = False

    def reset(self) -> None:
        """Forgets every turn but a system message at the beginning."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    @overload
    def send(self, content: str, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Generation: ...
    @overload
    def send(self, content: str, *, stream: Literal[True], **options: Unpack[Options]) -> PieceStream: ...
    def send(self, content: str, *, stream: bool = False, **options: Unpack[Options]) -> Generation | PieceStream:
        """Answers the user's next message; options, results and errors as for `PhiMoE.generate`.

        The message and its answer are kept once the answer has begun, as far as it came if a stream is left early.

        Raises:
            GenerationError: also where another answer is on its way, or a stream is first read when the conversation
                has gone on since; nothing is lost then, and the message can be sent again.

        """
        if not isinstance(content, str | list | tuple):
            raise GenerationError(f"the message is of type {type(content).__name__}, expected a string")
        if not content:
            raise GenerationError("the message is empty; give at least one character")
        messages = [*self.messages, {"role": "user", "content": content}]
        pieces = self._answer(messages, self._make_request(messages, "the conversation", **options))
        if stream:
            return pieces
        *_, last = pieces
        assert last.result is not None
        return last.result

    def _answer(self, messages: list[Message], request: Request) -> PieceStream:
        if not self._turn.acquire(blocking=False):
            raise GenerationError(
                "the conversation is in the middle of another answer; read that to its end, or close its stream, first"
            )
        answer: list[str] = []
        try:
            if self.messages != messages[:-1]:
                raise GenerationError("the conversation has gone on since this message was sent; send it again")
            for piece in generate(self._engine, [request], self._session):
                answer.append(piece.text)
                yield piece
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
            self._turn.release()
