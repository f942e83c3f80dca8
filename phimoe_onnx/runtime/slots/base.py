"""What every cache does for the decoder, whether keys and values lie on the host, grow there, or lie on a card.

A slot is a row's lasting number: it is the row's from its first `run_row` to `release`, whatever places in memory its
keys and values have meanwhile. decoder.py says which tokens a slot holds, a cache only where keys, values and logits
lie. V is vocab_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from phimoe_onnx.bundle import LOGITS_TO_KEEP, ROPE_LENGTH
from phimoe_onnx.runtime.sampling import Choice


class Cache(Protocol):
    """Keys, values and the last logits of up to `slots` slots, of up to `capacity` tokens each."""

    slots: int
    capacity: int

    def run_row(self, slot: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> NDArray[np.float32]:
        """Runs S new tokens of one slot after its first `past` ones, and keeps the last one's logits for `choose`.

        Args:
            slot: which; an unknown one becomes known.
            ids: the new tokens.
            past: how many cached tokens count; later ones are overwritten.
            keep: how many last positions get logits; 0 is all.
            rope_length: the length that chooses between longrope's factors, if it is more than past + S.

        Returns:
            float32 [keep or S, V]; empty where logits stay on a device, which is with `keep` 1.

        """

    def run_step(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """Runs one new token of each slot of `tokens`, after the `lengths` tokens that it holds; others keep theirs."""

    def choose(self, choices: Mapping[int, Choice], lengths: Mapping[int, int]) -> dict[int, int | Exception]:
        """The next token of each slot of `choices`, which holds `lengths` tokens, by the logits that were kept.

        In a token's place stands the error that kept that slot from having one: a GenerationError where its logits are
        not finite, or what its logits_processor raised.
        """

    def last_logits(self, slots: Collection[int]) -> dict[int, NDArray[np.float32]]:
        """The logits [V] that the slots' next tokens are or were chosen by, until the next run; from a device, too."""

    def release(self, slot: int) -> None:
        """Forgets a slot, if it is known."""

    def resize(self, slots: int, capacity: int) -> None:
        """Makes room for `slots` slots of `capacity` tokens, or gives it back; known ones keep what they hold.

        Raises:
            Exception: there is no memory for it; nothing has changed then.

        """


def scalars(keep: int, rope_length: int) -> dict[str, OrtValue]:
    """The inputs that say what is wanted of a pass, int64 [1] each; the caller must hold them as long as it runs."""
    values = {LOGITS_TO_KEEP: keep, ROPE_LENGTH: rope_length}
    return {name: OrtValue.ortvalue_from_numpy(np.array([value], np.int64)) for name, value in values.items()}


def free_place(taken: Collection[int]) -> int:
    """The lowest place, or number, that is not taken."""
    return next(place for place in itertools.count() if place not in taken)


def round_up(capacity: int) -> int:
    """To whole 256 tokens: a conversation grows by little, and its buffers then now and then only."""
    return -(-capacity // 256) * 256
