"""How many threads a pass runs on, and how long they wait for each other; spec/embedding.md has the same rules."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phimoe_onnx.errors import DeviceError, brief

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# A thread that finds no work looks for some this many microseconds, and then sleeps. ONNX Runtime's own choice is many
# milliseconds, in which threads take a busy machine's processor from each other.
SPIN_DURATION = "50"
SMALL_PASS = 8_000_000  # bytes of weights, times new tokens: up to here other threads cost more than they bring
MOST_THREADS = max(256, os.cpu_count() or 1)  # ONNX Runtime starts whatever is asked for


@dataclass(frozen=True)
class Sessions:
    """The sessions of one graph, for which passes are of one kind: the logits are the same to the bit.

    Attributes:
        main: on all threads.
        single: on one thread; None where it has no use.
        weights: the bytes of the graph's weights.
        per_token: whether several tokens of a pass get the bits that they get one by one, too.

    """

    main: InferenceSession
    single: InferenceSession | None = None
    weights: int = 0
    per_token: bool = False

    def of(self, tokens: int) -> InferenceSession:
        """The session for a pass over so many new tokens, those of all rows together."""
        return self.single if self.single and is_small(self.weights, tokens) else self.main


def is_small(weights: int, tokens: int = 1) -> bool:
    """Whether a pass over so many new tokens runs on one thread, in a graph of so many bytes of weights."""
    return tokens * weights <= SMALL_PASS


def check_threads(threads: Any) -> None:
    """Raises DeviceError unless `threads` is a number of threads, or None."""
    whole = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= MOST_THREADS):
        raise DeviceError(f"threads is {brief(threads)}, expected 1 to {MOST_THREADS}, or None for the default")
