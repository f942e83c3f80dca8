"""What the rows of a batch hold in their caches, and how they go on: prefill one row, choose tokens, step all rows by
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.bundle import Decoding
from phimoe_onnx.runtime.ort.errors import memory_errors
from phimoe_onnx.runtime.sampling import Choice
from phimoe_onnx.runtime.slots.device import DeviceCache
from phimoe_onnx.runtime.slots.host import GrowingCache, SharedCache


class Decoder:
    """The tokens that each row has in its cache; longrope's change of factors is handled here and nowhere above.

    A sequence that passes `rope_boundary` rotates every position by other factors, so its cached keys are then worth
    nothing and the row is prefilled again. V below is vocab_size.
    """

    def __init__(self, cache: SharedCache | GrowingCache | DeviceCache, decoding: Decoding, rows: int) -> None:
        self._cache = cache
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self._bytes_per_token = decoding.cache.bytes_per_token
        self._boundary = decoding.rope_boundary
        self._chunk = decoding.prefill_chunk
        self._long = [False] * rows  # whether the row's keys were rotated by the long factors

    def prefill(self, row: int, ids: Sequence[int]) -> None:
        """Makes the row hold `ids`, computing only what follows the prefix that it holds already."""
        self._prefill(row, ids, len(ids))

    def choose(self, choices: Sequence[Choice]) -> list[int]:
        """The token that follows each row's last one, whose logits the last `prefill` of the row or `step` computed.

        Raises:
            GenerationError: logits are not finite.

        """
        return self._cache.choose(choices, [len(held) for held in self.tokens])

    def step(self, ids: Sequence[int]) -> None:
        """Appends one token to every row."""
        for row, held in enumerate(self.tokens):
            if self._is_long(len(held) + 1) != self._long[row]:
                self._prefill(row, held.copy(), len(held) + 1)
        lengths = [len(held) for held in self.tokens]
        with memory_errors(
            f"a step of {len(ids)} rows, {sum(lengths)} tokens cached", sum(lengths) * self._bytes_per_token
        ):
            self._cache.run_step(ids, lengths)
        for held, token in zip(self.tokens, ids, strict=True):
            held.append(token)

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Row 0 from nothing: the logits after each token, in order, in pieces float32 [up to prefill_chunk, V]."""
        self.tokens[0].clear()
        yield from self._run(0, ids, 0, len(ids))

    def drop(self, row: int) -> None:
        """Forgets a row; the last row takes its number."""
        self._cache.drop(row)
        self.tokens[row], self._long[row] = self.tokens[-1], self._long[-1]
        self.tokens.pop()
        self._long.pop()

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in every row, keeping what is cached."""
        rows = len(self.tokens)
        with memory_errors(f"a cache of {rows} x {capacity} tokens", rows * capacity * self._bytes_per_token):
            self._cache.reserve(capacity)

    def _prefill(self, row: int, ids: Sequence[int], rope_length: int) -> None:
        held = self.tokens[row]
        reusable = 0
        if self._long[row] == self._is_long(rope_length):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(held, ids, strict=False))
            reusable = min(sum(1 for _ in same), len(ids) - 1)  # the last token always runs: its logits are wanted
        del held[reusable:]
        for _ in self._run(row, ids, 1, rope_length):
            pass

    def _run(self, row: int, ids: Sequence[int], keep: int, rope_length: int) -> Iterator[NDArray[np.float32]]:
        """Runs the rest of `ids` after what the row holds, chunk by chunk; yields float32 [keep or the chunk's length,
        V].
        """
        held = self.tokens[row]
        self._long[row] = self._is_long(rope_length)
        for start in range(len(held), len(ids), self._chunk):
            chunk = ids[start : start + self._chunk]
            with memory_errors(f"{len(chunk)} of a prompt's {len(ids)} tokens", len(ids) * self._bytes_per_token):
                logits = self._cache.run_row(row, chunk, start, keep, rope_length)
            held.extend(chunk)
            yield logits

    def _is_long(self, length: int) -> bool:
        return self._boundary is not None and length > self._boundary
