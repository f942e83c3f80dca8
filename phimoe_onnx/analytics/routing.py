"""Which experts a text uses: shares, pairs and margins, counted over all its tokens.

Dimensions: L layers, E experts. A token makes two choices in a layer, the first and the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.runtime.probe import Probe, Routing

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
NEAR = 0.1  # of the mask's width: so near its edge, a small rounding lets a rival in or out
BIN, BINS = 0.5, 20  # of the histogram of distances, in widths of the mask; one more bin holds what is farther


@dataclass(frozen=True)
class Usage:
    """What one text uses.

    Attributes:
        name: the text's.
        tokens: how many it has, and in how many `pieces` of the context's length they were read.
        share: float64 [L, E], of the choices; each layer's sum to 1.
        weight: float64 [L, E], the mean weight of an expert's output over the tokens that chose it; 0 where none did.
        pairs: int64 [L, E, E], how many tokens chose the one first and the other second.
        rival: float64 [L, 2], the share of tokens with whose first or second choice a rival counts.
        near: float64 [L, 2], the share of tokens whose margin lies within `NEAR` of the mask's edge.
        quantiles: float64 [L, 2, 5], the margins at `QUANTILES`; see `runtime.probe.Routing`.
        distances: int64 [2, BINS + 1], over all layers, the distances of the nearest rivals in widths of the mask.
    """

    name: str
    tokens: int
    pieces: int
    share: NDArray[np.float64]
    weight: NDArray[np.float64]
    pairs: NDArray[np.int64]
    rival: NDArray[np.float64]
    near: NDArray[np.float64]
    quantiles: NDArray[np.float64]
    distances: NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """Two experts that tokens of a layer choose together.

    Attributes:
        experts: their numbers, the lower one first.
        share: of the layer's tokens.
        lift: `share` by what it would be if the second choice did not depend on the first, but for being another.
    """

    experts: tuple[int, int]
    share: float
    lift: float


def read_usage(
    probe: Probe, name: str, ids: Sequence[int], context: int, step: Callable[[int], None] = lambda tokens: None
) -> Usage:
    """Runs a text of one token or more; one longer than the context is read in pieces, each as if alone.

    Raises:
        GenerationError, OutOfMemoryError: as for `Probe.routing`.
    """
    pieces = [probe.routing(ids[start : start + context], step) for start in range(0, len(ids), context)]
    return usage(name, pieces, 2 * probe.jitter)


def usage(name: str, pieces: Sequence[Routing], width: float) -> Usage:
    """The figures of a text of one piece or more; `width` is the mask's, 2 eps."""
    number = pieces[0].num_experts
    experts = np.concatenate([piece.experts for piece in pieces], axis=1)
    weights = np.concatenate([piece.weights for piece in pieces], axis=1).astype(np.float64)
    margins = np.concatenate([piece.margins for piece in pieces], axis=1).astype(np.float64)
    layers, tokens, _ = experts.shape
    pairs = np.zeros((layers, number, number), np.int64)
    totals = np.zeros((layers, number))
    for layer in range(layers):
        np.add.at(pairs[layer], (experts[layer, :, 0], experts[layer, :, 1]), 1)
        np.add.at(totals[layer], experts[layer], weights[layer])
    chosen = pairs.sum(axis=2) + pairs.sum(axis=1)
    # an infinite margin, of a choice without rivals, is beyond all bins, and so is any where the mask has no width
    widths = (margins + width) / width if width else np.full(margins.shape, np.inf)
    # the margin of a level rival is -width in float32, which may be a little less than it in float64
    bins = np.clip(np.floor(widths / BIN), 0, BINS).astype(np.int64)
    return Usage(
        name=name,
        tokens=tokens,
        pieces=len(pieces),
        share=chosen / (2 * tokens),
        weight=totals / np.maximum(chosen, 1),
        pairs=pairs,
        rival=(margins <= 0).mean(axis=1),
        near=(abs(margins) <= NEAR * width).mean(axis=1),
        quantiles=np.moveaxis(np.quantile(margins, QUANTILES, axis=1, method="lower"), 0, -1),
        distances=np.stack([np.bincount(bins[..., slot].ravel(), minlength=BINS + 1) for slot in range(2)]),
    )


def top_pairs(usage: Usage, layer: int, count: int) -> list[Pair]:
    """The pairs that most tokens of a layer choose, the most frequent first; of equal ones the lower experts."""
    share = usage.pairs[layer] / usage.tokens
    first, second = share.sum(axis=1), share.sum(axis=0)
    alone = np.outer(first, second)
    np.fill_diagonal(alone, 0.0)
    together, alone = share + share.T, alone + alone.T
    alone /= max(alone.sum() / 2, np.finfo(float).tiny)
    rows, columns = np.triu_indices(len(first), 1)
    order = np.argsort(-together[rows, columns], kind="stable")[:count]
    found = zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    return [
        Pair((a, b), float(together[a, b]), float(together[a, b] / alone[a, b])) for a, b in found if together[a, b]
    ]


def apart(usages: Sequence[Usage]) -> NDArray[np.float64]:
    """[n, n]: how far the shares of two texts are apart, from 0, equal, to 1, no expert in common; a mean over layers.

    It is the total variation distance: the share of choices that would have to be others.
    """
    shares = np.stack([usage.share for usage in usages])
    return np.asarray(abs(shares[:, None] - shares[None]).sum(axis=-1).mean(axis=-1) / 2)


def own_experts(usages: Sequence[Usage], number: int, count: int) -> list[tuple[int, int, float, float]]:
    """Where the text of that number differs most from the others, upwards: layer, expert, its share and their mean."""
    share = usages[number].share
    others = np.mean([usage.share for n, usage in enumerate(usages) if n != number], axis=0)
    order = np.argsort(-(share - others), axis=None, kind="stable")[:count]
    places = zip(*np.unravel_index(order, share.shape), strict=True)
    return [(int(layer), int(e), float(share[layer, e]), float(others[layer, e])) for layer, e in places]
