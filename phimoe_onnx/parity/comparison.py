"""How far one model's outputs are from another's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS = 256  # of logits that are compared at once


@dataclass
class Comparison:
    """How far one model's logits are from another's, over all tokens seen so far.

    Of outputs that are no logits of one distribution, `kl` and `top1_agreement` are None; of a task whose answer is one
    a text, `tokens` counts texts.
    """

    tokens: int = 0
    max_difference: float = 0.0
    mean_difference: float = 0.0
    kl: float | None = 0.0
    top1_agreement: float | None = 0.0

    def add(
        self, logits: NDArray[np.float32], expected: NDArray[np.float32], *, distribution: bool = True
    ) -> NDArray[np.float32]:
        """Takes in the logits [S, V] of one window, or other outputs that are no `distribution`.

        Returns:
            The KL divergence of each row, [S]; of what is no distribution an empty array.
        """
        scale, divergences = spread(expected), [np.empty(0, np.float32)]
        for rows in pieces(len(logits)):
            got, wanted = logits[rows], expected[rows]
            difference = np.abs(got - wanted)
            values = {"mean_difference": difference / scale}
            if distribution:
                log_p, log_q = log_softmax(wanted), log_softmax(got)
                values["kl"] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
                divergences.append(values["kl"])
                values["top1_agreement"] = got.argmax(axis=-1) == wanted.argmax(axis=-1)
            else:
                self.kl = self.top1_agreement = None
            self.take(len(got), float(difference.max() / scale), values)
        return np.concatenate(divergences)

    def take(self, tokens: int, largest: float, values: dict[str, NDArray[np.floating]]) -> None:
        """Takes in so many tokens with their largest difference and, by the attribute's name, what to average."""
        before, self.tokens = self.tokens, self.tokens + tokens
        self.max_difference = float(np.maximum(self.max_difference, largest))  # keeps a NaN
        for name, each in values.items():
            total = getattr(self, name) * before + float(each.mean(dtype=np.float64)) * tokens
            setattr(self, name, total / self.tokens)


def pieces(length: int) -> Iterator[slice]:
    """`length` rows in pieces of up to `ROWS`."""
    return (slice(start, min(start + ROWS, length)) for start in range(0, length, ROWS))


def spread(outputs: NDArray[np.float32]) -> float:
    """The standard deviation of all numbers, in float64 and without a copy of them."""
    mean = sum(float(outputs[rows].sum(dtype=np.float64)) for rows in pieces(len(outputs))) / outputs.size
    squares = (float(np.square(outputs[rows] - mean, dtype=np.float64).sum()) for rows in pieces(len(outputs)))
    return float(np.sqrt(sum(squares) / outputs.size))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def surprise(logits: NDArray[np.float32], token_ids: Sequence[int]) -> NDArray[np.float32]:
    """The negative log-probability of each token of a window but the first, float32 [S - 1], by its logits [S, V]."""
    targets = np.array(token_ids[1:], np.int64)[:, None]
    parts = [
        -np.take_along_axis(log_softmax(logits[rows]), targets[rows], axis=-1)[:, 0] for rows in pieces(len(targets))
    ]
    return np.concatenate([np.empty(0, np.float32), *parts])
