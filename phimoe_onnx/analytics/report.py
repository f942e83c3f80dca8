"""The experts of one text or several: as a table of 80 columns, and as an object for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from phimoe_onnx.analytics.routing import NEAR, QUANTILES, Usage, apart, own_experts, top_pairs

COLUMNS = 16  # experts side by side
NAME = 30  # characters of a text's name in a table


@dataclass(frozen=True)
class Report:
    """The texts that were run through one bundle.

    Attributes:
        bundle: the folder as it was given.
        source: the checkpoint that it came from.
        target: what it was exported for, and how it is quantised, as the manifest says it.
        quantize: likewise.
        jitter: the config's router_jitter_noise, eps.
        texts: one or more.
    """

    bundle: str
    source: str
    target: str
    quantize: str
    jitter: float
    texts: list[Usage]

    @property
    def shape(self) -> tuple[int, int]:
        """How many layers there are, and how many experts each has."""
        layers, experts = self.texts[0].share.shape
        return layers, experts


def as_dict(report: Report) -> dict[str, Any]:
    """All figures, for JSON: numbers that are not finite are None."""
    layers, experts = report.shape
    return {
        "bundle": report.bundle,
        "source": report.source,
        "target": report.target,
        "quantize": report.quantize,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "router_jitter_noise": report.jitter,
        "margin_quantiles": list(QUANTILES),
        "near": NEAR,
        "texts": [_text(usage) for usage in report.texts],
        "apart": apart(report.texts).tolist(),
    }


def _text(usage: Usage) -> dict[str, Any]:
    values = {field.name: getattr(usage, field.name) for field in dataclasses.fields(usage)}
    return {name: _plain(value.tolist()) if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(report: Report) -> Iterator[str]:
    """The table, line by line; 80 columns where the texts' names allow it."""
    layers, experts = report.shape
    yield f"{layers} layers, {experts} experts, two for each token; even use would be {1 / experts:.1%} each"
    for usage in report.texts:
        yield ""
        yield from _shares(usage)
        yield ""
        yield from _margins(usage)
    if len(report.texts) > 1:
        yield ""
        yield from _differences(report.texts)


def _shares(usage: Usage) -> Iterator[str]:
    pieces = f" in {usage.pieces} pieces" if usage.pieces > 1 else ""
    yield f"{usage.name}: {usage.tokens} token{'s' if usage.tokens > 1 else ''}{pieces}"
    yield "each expert's share of the choices, in %"
    experts = usage.share.shape[1]
    for start in range(0, experts, COLUMNS):
        shown = range(start, min(start + COLUMNS, experts))
        yield "layer" + "".join(f"{expert:4}" for expert in shown)
        for layer, share in enumerate(usage.share):
            yield f"{layer:5}" + "".join(f"{100 * share[expert]:4.0f}" for expert in shown)


def _margins(usage: Usage) -> Iterator[str]:
    yield "the most used pairs, and of how many tokens a rival counts or is near the mask's"
    yield "edge, in %, at the first and the second choice"
    yield "layer  pairs, % of tokens (times chance)                  counts         near"
    for layer in range(len(usage.share)):
        pairs = ", ".join(
            f"{'+'.join(map(str, pair.experts))} {pair.share:.0%} ({pair.lift:.1f})"
            for pair in top_pairs(usage, layer, 3)
        )
        figures = "".join(f"{100 * value:6.1f}" for value in (*usage.rival[layer], *usage.near[layer]))
        yield f"{layer:5}  {pairs:48}{figures}"


def _differences(texts: list[Usage]) -> Iterator[str]:
    yield "how far the texts are apart: % of choices that would have to be others"
    for usage, row in zip(texts, apart(texts), strict=True):
        yield f"{usage.name[:NAME]:{NAME}}" + "".join(f"{100 * value:6.1f}" for value in row)
    yield ""
    yield "the experts that a text uses more than the others do: layer.expert, % (theirs)"
    for number, usage in enumerate(texts):
        found = own_experts(texts, number, 3)
        own = ", ".join(f"{layer}.{expert} {share:.0%} ({others:.0%})" for layer, expert, share, others in found)
        yield f"{usage.name[:NAME]:{NAME}}  {own}"
