"""How far one model's outputs are from another's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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

    def add(self, logits: NDArray[np.float32], expected: NDArray[np.float32], *, distribution: bool = True) -> None:
        """Takes in the logits [S, V] of one window, or other outputs that are no `distribution`."""
        scale = float(expected.std())
        difference = np.abs(logits - expected)
        before, self.tokens = self.tokens, self.tokens + len(logits)
        self.max_difference = float(np.maximum(self.max_difference, difference.max() / scale))  # keeps a NaN
        means = {"mean_difference": difference / scale}
        if distribution:
            log_p, log_q = log_softmax(expected), log_softmax(logits)
            means["kl"] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
            means["top1_agreement"] = logits.argmax(axis=-1) == expected.argmax(axis=-1)
        else:
            self.kl = self.top1_agreement = None
        for name, values in means.items():
            total = getattr(self, name) * before + float(values.mean(dtype=np.float64)) * len(logits)
            setattr(self, name, total / self.tokens)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
