"""From logits to the next token: penalty, temperature, truncation and a draw that any language can reproduce.

In this order, as transformers does: repetition penalty, then (if temperature is 0) the largest logit, else temperature,
top-k, top-p, min-p and the draw. Ties go to the lower token id throughout. spec/sampling.md says the same without code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.errors import GenerationError, brief

COLDEST = 2.0**-126  # of temperatures that are no 0: below, a logit divided by it may be no number


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0, and what is less than COLDEST, takes the most likely token.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the fewest most likely tokens whose probabilities reach top_p (nucleus sampling, arXiv 1904.09751).
        min_p: keeps tokens at least min_p times as likely as the most likely one (arXiv 2407.01082).
        repetition_penalty: see `penalize`; 1 changes nothing.
        seed: of the draw, any integer, taken modulo 2**64.

    Raises:
        GenerationError: a value is out of its range.

    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "repetition_penalty": (1e-30 <= self.repetition_penalty <= 1e30, "1e-30 to 1e30; 1 is off"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise GenerationError(f"{name} is {brief(getattr(self, name))}, expected {expected}")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)


LogitsProcessor = Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Choice:
    """How a row's next token is chosen. `token_ids` and `seen` are the row's own and grow with it.

    Attributes:
        sampling: its options.
        token_ids: the new tokens so far; how many they are is the draw's step.
        seen: the distinct tokens of the prompt and of what was generated, for the repetition penalty.
        logits_processor: sees `token_ids` and the logits float32 [V] first, and returns the logits to go on with.

    """

    sampling: Sampling
    token_ids: Sequence[int]
    seen: Collection[int]
    logits_processor: LogitsProcessor | None = None


def sample_rows(logits: Mapping[int, NDArray[np.float32]], choices: Mapping[int, Choice]) -> dict[int, int | Exception]:
    """`sample` of each slot's logits [V]: the token, or the error that kept this slot alone from having one."""
    tokens: dict[int, int | Exception] = {}
    for slot, choice in choices.items():
        try:
            scores = logits[slot]
            if choice.logits_processor:
                scores = _process(scores.copy(), choice.token_ids, choice.logits_processor)
            tokens[slot] = sample(scores, choice.sampling, len(choice.token_ids), choice.seen)
        except Exception as error:  # a processor is the caller's code and may raise anything
            tokens[slot] = error
    return tokens


def _process(logits: NDArray[np.float32], token_ids: Sequence[int], processor: LogitsProcessor) -> NDArray[np.float32]:
    returned = processor(token_ids, logits)
    try:
        processed = np.asarray(returned, np.float32)
    except (TypeError, ValueError):
        raise GenerationError(
            f"logits_processor returned {type(returned).__name__}, expected an array of {len(logits)} logits"
        ) from None
    if processed.shape != logits.shape:
        raise GenerationError(
            f"logits_processor returned the shape {list(processed.shape)}, expected {list(logits.shape)}"
        )
    if not np.isfinite(largest := processed.max()):
        raise GenerationError(f"logits_processor returned logits whose largest is {largest}, expected a number")
    return processed


def sample(logits: NDArray[np.float32], sampling: Sampling, step: int, seen: Collection[int] = ()) -> int:
    """The next token.

    Args:
        logits: float32 [V].
        sampling: how to choose.
        step: how many tokens were generated before this one; with the seed it fixes the random number.
        seen: the distinct tokens of the prompt and of what was generated, for the repetition penalty.

    Raises:
        GenerationError: the logits are not finite, so the graph computed nonsense.

    """
    if not np.isfinite(logits.max()):
        raise GenerationError("the graph's logits are not finite; check the bundle with phimoe-verify")
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    return draw(logits, sampling, uniform(sampling.seed, step))


def penalize(logits: NDArray[np.float32], seen: Collection[int], penalty: float) -> NDArray[np.float32]:
    """Logits [V] of seen tokens divided by the penalty where positive, else multiplied (CTRL, arXiv 1909.05858)."""
    ids = np.fromiter(seen, np.int64, len(seen))
    logits = logits.copy()
    logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def draw(logits: NDArray[np.float32], sampling: Sampling, u: float) -> int:
    """The token at `u` in [0, 1) of the cumulative probabilities of the kept tokens, most likely first; logits float32
    [V].
    """
    order = most_likely(logits, sampling.top_k or len(logits))
    scaled = logits[order].astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    cumulative = weights.cumsum()
    kept = len(order)
    if sampling.top_p < 1:
        kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
    if sampling.min_p > 0:
        kept = min(kept, int(np.count_nonzero(weights >= sampling.min_p)))
    chosen = int(np.searchsorted(cumulative[:kept], u * cumulative[kept - 1], side="right"))
    return int(order[min(chosen, kept - 1)])


def most_likely(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The ids of the `count` largest of float32 logits [V] (all, if fewer), largest first, ties by lower id."""
    # one integer a token, its logit's bits made to sort downwards above its id: several times faster than a stable
    # argsort
    bits = (logits + np.float32(0)).view(np.uint32)  # + 0 makes -0 equal to 0
    falling = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))
    keys = (falling.astype(np.uint64) << np.uint64(32)) | np.arange(len(logits), dtype=np.uint64)
    if count < len(keys):
        keys = np.partition(keys, count)[:count]
    return (np.sort(keys) & np.uint64(0xFFFFFFFF)).astype(np.int64)


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1): the top 53 bits of the output number `step` (from 0) of SplitMix64 started at `seed`.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), all arithmetic modulo 2**64:
        z = seed + (step + 1) * 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)
    and the number is (z >> 11) / 2**53.
    """
    mask = (1 << 64) - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)
