"""The experts of one text or several as one page, which needs nothing but itself: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.analytics.report import Report
from phimoe_onnx.analytics.routing import BIN, BINS, Usage, apart, own_experts, top_pairs
from phimoe_onnx.page_parts import document

CELL = 20  # of a heat map, in its own units
LEFT, TOP = 26, 16  # room for the numbers of layers and experts
SMALL = 5  # a cell of the pairs of one layer
LEVELS = 8  # of their colour
BAR = 14  # the width of a bar
HEIGHT = 70  # of the highest


def page(report: Report) -> str:
    """The page, HTML of one file."""
    names = ", ".join(usage.name for usage in report.texts)
    return document(
        f"Experts of {report.source}",
        "<!doctype html>\n<!-- phimoe-experts -->",
        [
            f"<p>Bundle {escape(report.bundle)}, for {escape(report.target)}, weights {escape(report.quantize)}. "
            f"Texts: {escape(names)}.</p>",
            *_shares(report),
            *(_differences(report.texts) if len(report.texts) > 1 else ()),
            *_pairs(report.texts),
            *_margins(report),
        ],
    )


def _shares(report: Report) -> Iterator[str]:
    number = report.shape[1]
    most = max(float(usage.share.max()) for usage in report.texts)
    yield "<h2>Share of each expert</h2>"
    yield (
        f"<p>A row is a layer, a column an expert. Each token chooses two of {number} experts in each layer, so even "
        f"use would be {1 / number:.1%} of the choices.</p>"
    )
    yield f'<div class="legend">0% {_scale()} {most:.0%} of the choices of a layer</div>'
    yield '<div class="cards">'
    for usage in report.texts:
        shown = [
            [f"{share:.1%} of the choices, mean weight {weight:.2f}" for share, weight in zip(*row, strict=True)]
            for row in zip(usage.share, usage.weight, strict=True)
        ]
        yield f'<div class="card">{_title(usage)}{_heat_map(usage.share / most, shown, usage.name)}</div>'
    yield "</div>"


def _differences(texts: Sequence[Usage]) -> Iterator[str]:
    yield "<h2>What sets the texts apart</h2>"
    yield (
        "<p>Each share less the mean of the other texts': more in the one colour, less in the other. How far two texts "
        "are apart is how many of the choices would have to be others, a mean over the layers.</p>"
    )
    differences = [
        usage.share - np.mean([other.share for other in texts if other is not usage], axis=0) for usage in texts
    ]
    most = max(float(abs(difference).max()) for difference in differences) or 1.0
    yield (
        f'<div class="legend">{100 * most:.0f} points less {_scale("less", back=True)}{_scale("more")} more</div>'
        '<div class="cards">'
    )
    for number, (usage, difference) in enumerate(zip(texts, differences, strict=True)):
        shown = [[f"{100 * value:+.1f} points" for value in row] for row in difference]
        own = "; ".join(
            f"layer {layer}, expert {expert}: {share:.0%} ({others:.0%})"
            for layer, expert, share, others in own_experts(texts, number, 3)
        )
        yield f'<div class="card">{_title(usage)}{_heat_map(difference / most, shown, usage.name)}'
        yield f"<p>Most its own (the others): {own}.</p></div>"
    yield "</div><details open><summary>How far apart, % of the choices</summary>"
    yield '<div class="wide"><table><thead><tr><th></th>'
    yield "".join(f"<th>{escape(usage.name)}</th>" for usage in texts) + "</tr></thead><tbody>"
    for usage, row in zip(texts, apart(texts), strict=True):
        cells = "".join(f"<td>{100 * value:.1f}</td>" for value in row)
        yield f"<tr><td>{escape(usage.name)}</td>{cells}</tr>"
    yield "</tbody></table></div></details>"


def _pairs(texts: Sequence[Usage]) -> Iterator[str]:
    yield "<h2>Experts that are chosen together</h2>"
    yield (
        "<p>The most frequent pairs of each layer, their share of the tokens, and how many times as often that is as "
        "if the second choice did not depend on the first. In the squares a row is one expert of a pair and a column "
        "the other; each layer has its own scale.</p>"
    )
    yield '<div class="cards">'
    for usage in texts:
        yield f'<div class="card">{_title(usage)}<div class="wide"><table><thead><tr><th>layer</th>'
        yield '<th class="words">pairs</th></tr></thead><tbody>'
        for layer in range(len(usage.share)):
            pairs = " ".join(
                f"<span>{'+'.join(map(str, pair.experts))} {pair.share:.1%} "
                f'<span class="soft">&times;{pair.lift:.1f}</span></span>'
                for pair in top_pairs(usage, layer, 3)
            )
            yield f'<tr><td>{layer}</td><td class="words">{pairs}</td></tr>'
        yield '</tbody></table></div><details><summary>All pairs, layer by layer</summary><div class="small">'
        for layer, pairs_of_layer in enumerate(usage.pairs):
            yield f"<figure>{_square(pairs_of_layer + pairs_of_layer.T)}<figcaption>layer {layer}</figcaption></figure>"
        yield "</div></details></div>"
    yield "</div>"


def _margins(report: Report) -> Iterator[str]:
    yield "<h2>How near the other experts were</h2>"
    yield (
        f"<p>An expert's weight is 1 unless a rival counts: one whose score is within 2 eps, {2 * report.jitter:g}, of "
        "its own, relative to the larger of the two. That is SparseMixer's mask. The bars count the nearest rivals by "
        "their distance, in widths of the mask. To the left of the line a rival counts; at 0 it is level with the "
        "choice, and another rounding may choose it. Within a tenth of the width of the line, a rounding may let a "
        "rival in or out, and the weight jumps.</p>"
    )
    yield '<div class="cards">'
    for usage in report.texts:
        yield f'<div class="card">{_title(usage)}'
        for slot, name in enumerate(("First choice", "Second choice")):
            yield _histogram(usage.distances[slot], name)
        yield '<details><summary>Layer by layer, % of the tokens</summary><div class="wide"><table><thead><tr>'
        yield "".join(f"<th>{name}</th>" for name in ("layer", "rival, 1st", "2nd", "near edge, 1st", "2nd"))
        yield "</tr></thead><tbody>"
        for layer, figures in enumerate(np.concatenate([usage.rival, usage.near], axis=1)):
            cells = "".join(f"<td>{100 * value:.1f}</td>" for value in figures)
            yield f"<tr><td>{layer}</td>{cells}</tr>"
        yield "</tbody></table></div></details></div>"
    yield "</div>"


def _title(usage: Usage) -> str:
    return f"<h3>{escape(usage.name)} <span>{usage.tokens} token{'s' if usage.tokens > 1 else ''}</span></h3>"


def _scale(color: str = "more", *, back: bool = False) -> str:
    cells = "".join(
        f'<rect class="{color}" x="{20 * (7 - n if back else n)}" width="20" height="12" fill-opacity="{n / 7:.2f}"/>'
        for n in range(8)
    )
    return f'<svg viewBox="0 0 160 12" aria-hidden="true"><rect class="base" width="160" height="12"/>{cells}</svg>'


def _heat_map(values: NDArray[np.float64], shown: Sequence[Sequence[str]], name: str) -> str:
    """Values [layers, experts] from -1 to 1, and what each cell says when it is pointed at."""
    layers, experts = values.shape
    width, height = LEFT + CELL * experts, TOP + CELL * layers
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}, layer by expert">',
        f'<rect class="base" x="{LEFT}" y="{TOP}" width="{CELL * experts}" height="{CELL * layers}"/>',
    ]
    parts += [
        f'<text x="{LEFT + CELL * e + CELL / 2:g}" y="{TOP - 4}" text-anchor="middle">{e}</text>'
        for e in range(experts)
    ]
    for layer, row in enumerate(values):
        y = TOP + CELL * layer
        parts.append(f'<text x="{LEFT - 5}" y="{y + CELL / 2 + 3.5:g}" text-anchor="end">{layer}</text>')
        for e, value in enumerate(row):
            parts.append(
                f'<rect class="{"less" if value < 0 else "more"}" x="{LEFT + CELL * e}" y="{y}" width="{CELL - 1}" '
                f'height="{CELL - 1}" fill-opacity="{abs(value):.3f}"><title>layer {layer}, expert {e}: '
                f"{shown[layer][e]}</title></rect>"
            )
    return "".join([*parts, "</svg>"])


def _square(counts: NDArray[np.int64]) -> str:
    """Counts [experts, experts] as a square of cells; those of one colour are one path, which keeps the page small."""
    side = SMALL * len(counts)
    levels = np.ceil(LEVELS * counts / max(1, counts.max())).astype(int)
    paths = []
    for level in range(1, LEVELS + 1):
        cells = "".join(f"M{SMALL * x} {SMALL * y}h{SMALL}v{SMALL}h-{SMALL}z" for y, x in np.argwhere(levels == level))
        if cells:
            paths.append(f'<path class="more" fill-opacity="{level / LEVELS:g}" d="{cells}"/>')
    box = f'<svg viewBox="0 0 {side} {side}" width="{side}" height="{side}" aria-hidden="true">'
    return f'{box}<rect class="base" width="{side}" height="{side}"/>{"".join(paths)}</svg>'


def _histogram(counts: NDArray[np.int64], name: str) -> str:
    """Counts [BINS + 1]; those of the last bin, mostly far more than of any other, are said in words."""
    total, most = max(1, int(counts.sum())), max(1, int(counts[:-1].max()))
    width, floor, edge = BAR * BINS, 4 + HEIGHT, round(BAR / BIN)
    within, farther = counts[: round(1 / BIN)].sum() / total, counts[-1] / total
    parts = [
        f"<p>{name}: a rival counts for {within:.1%}; {farther:.1%} are farther than {BIN * BINS:g} widths.</p>",
        f'<svg viewBox="-4 0 {width + 12} {floor + 20}" role="img" aria-label="{name}: distances of rivals">',
    ]
    for n, count in enumerate(counts[:-1].tolist()):
        height = HEIGHT * count / most
        parts.append(
            f'<rect class="{"less" if n < 1 / BIN else "more"}" x="{BAR * n}" y="{floor - height:.1f}" '
            f'width="{BAR - 2}" height="{height:.1f}"><title>{BIN * n:g} to {BIN * (n + 1):g} widths: '
            f"{count / total:.2%}</title></rect>"
        )
    parts.append(f'<path class="edge" d="M{edge - 1} 0V{floor}"/>')
    parts += [
        f'<text x="{place * edge - 1}" y="{floor + 12}" text-anchor="middle">{place}</text>'
        for place in range(0, round(BIN * BINS) + 1, 2)
    ]
    return "".join([*parts, "</svg>"])
