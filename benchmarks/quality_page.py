"""quality.py's results as a page: quality against bits a weight, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from phimoe_onnx.page_parts import document, table

if TYPE_CHECKING:
    from benchmarks.quality import Result

WIDTH, HEIGHT = 900, 560  # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 14, 40
LETTER, LINE = 6.3, 14  # of a label, about
PLACES = tuple((side, lines) for lines in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5) for side in (1, -1))  # of labels
COLUMNS = ("", "front", "bits", "bits, Phi-3.5", "perplexity", "KL mean", "median", "99.9 %", "same top-1")

STYLE = """
tbody th { white-space: normal; min-width: 8em; }
.plot { max-width: none !important; min-width: 640px; } .plot text { font-size: 11px; }
.plot .name { fill: var(--ink); } .plot .grid { stroke: var(--line); } .front { stroke: var(--more); fill: none; }
.leader { stroke: var(--soft); stroke-width: 0.6; }
.legend i { font-style: normal; } .mine { fill: var(--more); } .peer { fill: var(--less); }
"""


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """The numbers of the points, of which both coordinates are the better the smaller, that no other is as good as in
    both and better than in one.
    """
    best, front = math.inf, set()
    before: tuple[float, float] | None = None
    for n in sorted(range(len(points)), key=lambda n: points[n]):
        if points[n][1] < best or points[n] == before:
            front.add(n)
            best, before = points[n][1], points[n]
    return front


def page(mark: str, settings: dict[str, Any], results: Sequence[Result]) -> str:
    """The page, HTML of one file."""
    return document(f"Quality against bits: {settings['checkpoint']}", mark, _parts(settings, results), STYLE)


def _parts(settings: dict[str, Any], results: Sequence[Result]) -> Iterator[str]:
    yield (
        "<p>To the left is smaller, down is nearer to the checkpoint. The line is the Pareto front: nothing else is "
        "both smaller and nearer. Bits count scales and zero points, over experts, attention and head. Bundles of "
        "phimoe-onnx run on ONNX Runtime, with activations of int8; the others' weights run in PyTorch in float32.</p>"
    )
    for text, count in settings["windows"].items():
        rows = sorted((each for each in results if text in each.texts), key=lambda each: -(each.bits or 0))
        yield f"<h2>{escape(text)}</h2><p>{count} windows of {settings['length']} tokens.</p>"
        if rows:
            yield from _text(text, rows)
    missing = [(f"{each.source} {each.name}", each.reason) for each in results if not each.texts]
    if missing:
        yield '<h2>Not run</h2><div class="card">' + table("Not run", ("", "why"), missing, words=(1,)) + "</div>"


def _text(text: str, rows: Sequence[Result]) -> Iterator[str]:
    points = [(each.bits or 0.0, each.texts[text].kl) for each in rows]
    front = pareto(points)
    names = [_short(each) for each in rows]
    ours = [each.source == "phimoe-onnx" for each in rows]
    yield '<div class="card"><div class="legend"><svg viewBox="0 0 12 12" style="flex:0 0 12px" aria-hidden="true">'
    yield '<circle class="mine" cx="6" cy="6" r="5"/></svg><i>phimoe-onnx</i>'
    yield '<svg viewBox="0 0 12 12" style="flex:0 0 12px;margin:0" aria-hidden="true">'
    yield '<path class="peer" d="M6 0L12 11H0z"/></svg><i>others</i></div>'
    yield f'<div class="wide" tabindex="0" role="region" aria-label="Drawing of {escape(text)}">'
    yield scatter(points, names, ours, front) + "</div></div>"
    cells = []
    for n, each in enumerate(rows):
        q = each.texts[text]
        cells.append(
            (
                *(f"{each.source} {each.name}", "yes" if n in front else "", f"{each.bits:.2f}"),
                *(f"{each.bits_phi35:.2f}", f"{100 * q.change:+.2f} ± {100 * q.bound:.2f} %", f"{q.kl:.4f}"),
                *(f"{q.kl_median:.4f}", f"{q.kl_q999:.3f}", f"{q.top1:.2%}"),
            )
        )
    yield f'<div class="card" style="margin-top:16px">{table(f"Figures of {text}", COLUMNS, cells)}</div>'


def _short(result: Result) -> str:
    """What stands beside a point."""
    name = result.name.replace("MatMulNBits ", "ORT ").replace(", importance matrix", " imatrix")
    return f"NNCF {name}" if result.source == "nncf" else name


def scatter(points: Sequence[tuple[float, float]], names: Sequence[str], ours: Sequence[bool], front: set[int]) -> str:
    """Points (bits, KL), both on logarithmic scales, each with its name; ours are circles, others triangles."""
    low, high = (math.log2(f * each) for f, each in zip((0.94, 1.12), (min(points)[0], max(points)[0]), strict=True))
    kls = [math.log10(max(p[1], 1e-9)) for p in points]
    bottom, top = min(kls) - 0.15, max(kls) + 0.15

    def x(bits: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(bits) - low) / (high - low)

    def y(log: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - log) / (top - bottom)

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="KL by bits a weight">']
    for bits in range(math.ceil(2**low), math.floor(2**high) + 1):
        parts.append(f'<path class="grid" d="M{x(bits):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(bits):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{bits}</text>')
    for power in range(math.floor(bottom), math.ceil(top) + 1):
        for factor in (1, 2, 5):
            log = power + math.log10(factor)
            if bottom <= log <= top:
                parts.append(f'<path class="grid" d="M{LEFT} {y(log):.1f}H{WIDTH - RIGHT}"/>')
                value = f"{factor * 10.0**power:.4g}"
                parts.append(f'<text x="{LEFT - 6}" y="{y(log) + 4:.1f}" text-anchor="end">{value}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">bits a weight</text>')
    parts.append(f'<text x="4" y="{TOP - 3}">KL</text>')
    line = sorted((points[n][0], kls[n]) for n in front)
    path = " ".join(f"{'ML'[n > 0]}{x(bits):.1f} {y(log):.1f}" for n, (bits, log) in enumerate(line))
    parts.append(f'<path class="front" stroke-width="1.5" d="{path}"/>')
    places = [(x(bits), y(log)) for (bits, _), log in zip(points, kls, strict=True)]
    for n, label in enumerate(_labels(places, names)):
        a, b = places[n]
        if ours[n]:
            shape = f'<circle class="mine" cx="{a:.1f}" cy="{b:.1f}" r="5">'
        else:
            shape = f'<path class="peer" d="M{a:.1f} {b - 6:.1f}l6 10h-12z">'
        said = f"{names[n]}: {points[n][0]:.2f} bits, KL {points[n][1]:.4f}" + (", on the front" if n in front else "")
        tag = "circle" if ours[n] else "path"
        parts.append(f"{shape}<title>{escape(said)}</title></{tag}>{label}")
    return "".join([*parts, "</svg>"])


def _labels(places: Sequence[tuple[float, float]], names: Sequence[str]) -> Iterator[str]:
    """The names beside their points, each where it hides the least of what is there."""
    taken = [(a - 6, b - 6, a + 6, b + 6) for a, b in places]
    for (a, b), name in zip(places, names, strict=True):
        length, choices = LETTER * len(name), []
        for side, lines in PLACES:
            left, middle = a + 9 * side - (length if side < 0 else 0), b + LINE * lines
            box = (left, middle - LINE / 2, left + length, middle + LINE / 2)
            outside = sum(max(0.0, d) for d in (LEFT - box[0], box[2] - WIDTH, -box[1], box[3] - HEIGHT + BOTTOM))
            hidden = sum(
                max(0.0, min(box[2], o[2]) - max(box[0], o[0])) * max(0.0, min(box[3], o[3]) - max(box[1], o[1]))
                for o in taken
            )
            choices.append((hidden + 100 * outside + 8 * abs(lines), len(choices), side, middle, box))
        _, _, side, middle, box = min(choices)
        taken.append(box)
        near = "start" if side > 0 else "end"
        leader = f'<path class="leader" d="M{a:.1f} {b:.1f}L{a + 8 * side:.1f} {middle:.1f}"/>' if middle != b else ""
        yield (
            f'{leader}<text class="name" x="{a + 9 * side:.1f}" y="{middle + 4:.1f}" text-anchor="{near}">'
            f"{escape(name)}</text>"
        )
