"""What stands behind the averages of a report: token by token, layer by layer, kind of weight by kind of weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.text.tokenizer import Tokenizer

PASSAGE = 48  # tokens
PASSAGES = 5
BINS = tuple(
    10.0 ** (n / 2) for n in range(-14, 4)
)  # nats; a count lies below the first, between two, or past the last


@dataclass(frozen=True)
class Divergence:
    """How the KL divergence of the bundle from the reference, in nats, is spread over the tokens.

    Attributes:
        mean: over all tokens, as are the others.
        median: half of the tokens have less.
        q999: 99.9 % of the tokens have less.
        largest: of any token.
        bins: the edges of `counts`, in nats.
        counts: how many tokens lie below the first edge, from one to the next, and from the last up.
    """

    mean: float
    median: float
    q999: float
    largest: float
    bins: list[float]
    counts: list[int]


@dataclass(frozen=True)
class WeightError:
    """How a matrix, or a stack of experts, is stored, and what that does to its products.

    Attributes:
        layer: its number; None of what is in no layer.
        kind: the last part of its name in modeling.py, such as "q_proj".
        bits: a weight, with the scales and the zero points.
        weights: how many it has.
        error: relative, of its outputs, over the inputs that the reference gives it; see `products.Errors`.
    """

    layer: int | None
    kind: str
    bits: float
    weights: int
    error: float


@dataclass(frozen=True)
class Routing:
    """Which experts the text uses.

    Attributes:
        reference: [layers][experts], the share of the choices in the reference; each layer's sum to 1.
        stored: the same with the weights that the bundle stores; None where they are the reference's, or not known.
        agreement: [layers], the share of the tokens whose two experts both stay; None as `stored` is.
    """

    reference: list[list[float]]
    stored: list[list[float]] | None = None
    agreement: list[float] | None = None


@dataclass(frozen=True)
class Token:
    """A token of the text, and how the two expect it.

    Attributes:
        text: its own; "" of a token that is half a character or no text.
        kl: the divergence of the bundle from the reference in what comes at this place, in nats.
        reference: the token that the reference finds the likeliest here; `bundle` likewise.
    """

    text: str
    kl: float
    reference: str
    bundle: str


@dataclass(frozen=True)
class Passage:
    """Tokens in a row: where they begin, in which window and at which of its tokens, and their mean KL in nats."""

    window: int
    start: int
    kl: float
    tokens: list[Token]


@dataclass
class Evidence:
    """Of a task other than text-generation `divergence` is None and `passages` is empty.

    Attributes:
        weights: of a bundle that rounds, when the checkpoint itself is at hand.
        passages: those with the largest mean KL first.
    """

    routing: Routing
    weights: list[WeightError] = field(default_factory=list)
    divergence: Divergence | None = None
    passages: list[Passage] = field(default_factory=list)


@dataclass
class Tokens:
    """What is gathered window by window: each token's KL, and the best tokens of both, arrays [S]."""

    kl: list[NDArray[np.floating]] = field(default_factory=list)
    reference: list[NDArray[np.integer]] = field(default_factory=list)
    bundle: list[NDArray[np.integer]] = field(default_factory=list)

    def add(self, kl: NDArray[np.floating], reference: NDArray[np.integer], bundle: NDArray[np.integer]) -> None:
        """Takes in a window; place s of each array is about the token after token s."""
        self.kl.append(kl)
        self.reference.append(reference)
        self.bundle.append(bundle)


def divergence(kl: Sequence[NDArray[np.floating]]) -> Divergence:
    """Of each token's KL, window after window. Rounding may make one a little less than 0."""
    each = np.concatenate(kl).astype(np.float64)
    places = np.searchsorted(BINS, each, side="right")
    return Divergence(
        mean=float(each.mean()),
        median=float(np.median(each)),
        q999=float(np.quantile(each, 0.999)),
        largest=float(each.max()),
        bins=list(BINS),
        counts=np.bincount(places, minlength=len(BINS) + 1).tolist(),
    )


def passages(tokenizer: Tokenizer, windows: Sequence[list[int]], seen: Tokens) -> list[Passage]:
    """The `PASSAGES` runs of up to `PASSAGE` tokens with the largest mean KL that do not overlap."""
    candidates: list[tuple[float, int, int]] = []
    for number, kl in enumerate(seen.kl):
        ahead = kl[:-1].astype(np.float64)  # the last place is about a token that is not in the text
        length = min(PASSAGE, len(ahead))
        if length:
            sums = np.convolve(ahead, np.ones(length), "valid") / length
            candidates += [(float(mean), number, place + 1) for place, mean in enumerate(sums)]
    taken: list[tuple[float, int, int]] = []
    for mean, number, start in sorted(candidates, key=lambda each: -each[0]):
        if all(number != other or abs(start - place) >= PASSAGE for _, other, place in taken):
            taken.append((mean, number, start))
        if len(taken) == PASSAGES:
            break
    return [
        Passage(number, start, mean, _tokens(tokenizer, windows[number], start, number, seen))
        for mean, number, start in taken
    ]


def _tokens(tokenizer: Tokenizer, window: list[int], start: int, number: int, seen: Tokens) -> list[Token]:
    stream = tokenizer.stream(window[:start])
    return [
        Token(
            text=stream.add(id),
            kl=float(seen.kl[number][place - 1]),
            reference=tokenizer.token_text(int(seen.reference[number][place - 1])),
            bundle=tokenizer.token_text(int(seen.bundle[number][place - 1])),
        )
        for place, id in enumerate(window[start : start + PASSAGE], start=start)
    ]


def weight_errors(
    errors: Mapping[str, float], bits: Mapping[str, float], sizes: Mapping[str, int]
) -> list[WeightError]:
    """Of each matrix that is in all three, by its name in modeling.py."""
    found = []
    for name, error in errors.items():
        if name in bits:
            parts = name.removesuffix(".weight").split(".")
            layer = int(parts[2]) if "layers" in parts else None
            found.append(WeightError(layer, parts[-1], bits[name], sizes[name], error))
    return found


def shares(routing: NDArray[np.integer], experts: int) -> list[list[float]]:
    """Of routing [layers, tokens, 2] each layer's shares of the choices."""
    return [(np.bincount(layer.ravel(), minlength=experts) / layer.size).tolist() for layer in routing]


def agreement(routing: NDArray[np.integer], other: NDArray[np.integer]) -> list[float]:
    """Of each layer the share of the tokens whose two experts are the same, [layers, tokens, 2] each."""
    same: list[float] = (routing == other).all(axis=-1).mean(axis=-1).tolist()
    return same
