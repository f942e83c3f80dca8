"""A conversation of several turns over one cache, so that a turn computes only what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.generate import Generation, Options, PieceStream, Request, generate
from phimoe_onnx.text.template import Message

if TYPE_CHECKING:
    from phimoe_onnx.runtime.model import PhiMoE


class Conversation:
    """What was said so far; `PhiMoE.chat` makes one.

    Every turn renders the whole conversation, and the decoder keeps the longest prefix of it that is cached already.

    Attributes:
        messages: the turns, each {"role": ..., "content": ...}; may be edited.

    """

    def __init__(self, model: PhiMoE, system: str | None = None) -> None:
        self.messages: list[Message] = []
        self._model = model
        self._system = system
        self._decoder = model.decoder(1, 0)
        self.reset()

    def reset(self) -> None:
        """Forgets every turn but the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    @overload
    def send(self, content: str, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Generation: ...
    @overload
    def send(self, content: str, *, stream: Literal[True], **options: Unpack[Options]) -> PieceStream: ...
    def send(self, content: str, *, stream: bool = False, **options: Unpack[Options]) -> Generation | PieceStream:
        """Answers the user's next message; options, results and errors as for `PhiMoE.generate`.

        The message and its answer are kept once the answer has begun, as far as it came if a stream is left early.
        """
        if not content:
            raise GenerationError("the message is empty; give at least one character")
        messages = [*self.messages, {"role": "user", "content": content}]
        request = self._model.request(messages, "the conversation", **options)
        self._decoder.reserve(len(request.prompt) + request.max_new_tokens)
        pieces = self._answer(messages, request)
        if stream:
            return pieces
        *_, last = pieces
        assert last.result is not None
        return last.result

    def _answer(self, messages: list[Message], request: Request) -> PieceStream:
        answer: list[str] = []
        try:
            for piece in generate(self._decoder, self._model.tokenizer, self._model.eos, [request]):
                answer.append(piece.text)
                yield piece
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
