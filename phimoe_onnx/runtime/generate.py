"""Prompts in, pieces out: what one call of `generate` or one turn of a conversation asks of the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence

from phimoe_onnx.runtime.engine import Engine
from phimoe_onnx.runtime.request import Request
from phimoe_onnx.runtime.row import Piece

PieceStream = Generator[Piece, None, None]


def generate(engine: Engine, requests: Sequence[Request], session: object = None) -> PieceStream:
    """Yields every new token of every request as it comes; rows that are not read any more are cancelled.

    Args:
        engine: it is driven by whoever reads.
        requests: they begin together.
        session: see `Engine.submit`.

    Raises:
        EngineFullError: before the first piece.
        Exception: what ended a row of these before its time; the others are cancelled.

    """
    came: deque[Piece | Exception] = deque()
    rows = engine.submit(requests, came.append, session)
    left = len(rows)
    try:
        while left:
            while not came:
                engine.step(unless=came)
            piece = came.popleft()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.result is not None
            yield piece
    finally:
        engine.cancel(rows)
