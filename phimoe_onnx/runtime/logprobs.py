"""How likely the model found a token, and what it found more likely: of its own logits, before any option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.runtime.sampling import most_likely
from phimoe_onnx.text.tokenizer import Tokenizer

MOST_LOGPROBS = 20  # alternatives a token, as OpenAI's and vLLM's interfaces have it


@dataclass(frozen=True)
class Alternative:
    """A token that might have come.

    Attributes:
        token_id: the token.
        text: its own text, as behind other text: with the space before a word. A special token's is its name; a token
            that is a part of a character has U+FFFD.
        logprob: the natural logarithm of its probability.

    """

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Logprobs:
    """What the model says of one new token, by its own logits: before logits_processor, penalty and temperature.

    Attributes:
        logprob: the natural logarithm of the token's probability.
        top: the most likely tokens, as many as were asked for, the likeliest first, ties by lower id; the token itself
            is one of them only where it is that likely.

    """

    logprob: float
    top: tuple[Alternative, ...]


def token_logprobs(logits: NDArray[np.float32], token: int, count: int, tokenizer: Tokenizer) -> Logprobs:
    """Those of `token` and of the `count` most likely ones, by the logits [V] that it was chosen by."""
    chosen, *top = log_probabilities(logits, [token, *(ids := most_likely(logits, count).tolist())]).tolist()
    alternatives = (Alternative(id, tokenizer.token_text(id), logprob) for id, logprob in zip(ids, top, strict=True))
    return Logprobs(chosen, tuple(alternatives))


def log_probabilities(logits: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float64]:
    """The logarithm of the softmax of logits [V] at these ids: x - max - log(sum(exp(x - max)))."""
    x = logits.astype(np.float64)
    x -= x.max()
    found: NDArray[np.float64] = x[ids] - np.log(np.exp(x).sum())
    return found
