"""What the pages are made of: one file of HTML each, without a script, a font or the network.

Text that comes from users is escaped by whoever hands it in, but for the names and cells that these functions escape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #22252a; --soft: #666c76; --line: #dcdad5;
  --more: #1560a8; --less: #b4501e; --base: #eeece7; --heat: 205 92 30; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1d2024; --ink: #e4e6e9; --soft: #9aa1ab; --line: #343940;
    --more: #6cb2f5; --less: #f09a62; --base: #2a2e34; --heat: 226 122 62; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 8px; overflow-wrap: anywhere; }
h3 span, p, figcaption, summary, .soft { color: var(--soft); }
h3 span { font-weight: normal; }
p { margin: 0 0 14px; max-width: 70ch; }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; min-width: 0; }
.card > svg { display: block; width: 100%; height: auto; max-width: 520px; }
.card > p { margin: 8px 0 0; font-size: 0.86rem; }
.wide { overflow-x: auto; }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; }
.base { fill: var(--base); } .more { fill: var(--more); } .less { fill: var(--less); }
:focus-visible { outline: 2px solid var(--more); outline-offset: 2px; }
.edge { stroke: var(--ink); stroke-dasharray: 3 3; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; min-width: 280px; }
th, td { text-align: right; padding: 3px 0 3px 12px; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.words, th.words { text-align: left; white-space: normal; }
td.words span { display: inline-block; margin-right: 14px; } td.words span span { margin: 0; }
.small { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 10px; }
figure { margin: 0; } figcaption { font-size: 0.75rem; }
details { margin-top: 14px; } summary { cursor: pointer; }
.legend { display: flex; gap: 8px; align-items: center; font-size: 0.86rem; margin-bottom: 12px; }
.legend svg { flex: 0 1 160px; min-width: 0; height: 12px; } .legend svg + svg { margin-left: -8px; }
"""


def document(title: str, mark: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page, light or dark as the reader has it.

    Args:
        title: escaped here.
        mark: how the file begins, by which the command knows its own (cli/_output.py).
        parts: HTML, line by line.
        style: more CSS.
    """
    title = escape(title)
    return "\n".join(
        [
            mark,
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}{style}</style></head><body><main>",
            f"<h1>{title}</h1>",
            *parts,
            "</main></body></html>\n",
        ]
    )


def table(
    name: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    words: Sequence[int] = (),
    shades: Sequence[Sequence[float | None]] = (),
) -> str:
    """A table that is scrolled by itself where the page is narrower, by touch or by keys.

    Args:
        name: what a screen reader calls it.
        columns: the heads; the first cell of each row is a head, too.
        rows: the cells as text.
        words: the columns that hold words, which stand to the left.
        shades: of each row, how deeply each cell behind the first is coloured, from 0 to 1; None is not at all.
    """

    def kind(column: int) -> str:
        return ' class="words"' if column in words else ""

    parts = [f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}"><table><thead><tr>']
    parts += [f'<th scope="col"{kind(n)}>{escape(column)}</th>' for n, column in enumerate(columns)]
    parts.append("</tr></thead><tbody>")
    for number, (first, *cells) in enumerate(rows):
        parts.append(f'<tr><th scope="row">{escape(first)}</th>')
        shade = shades[number] if shades else [None] * len(cells)
        for n, (cell, depth) in enumerate(zip(cells, shade, strict=True), start=1):
            color = "" if depth is None else f' style="background:rgb(var(--heat) / {0.5 * depth:.2f})"'
            parts.append(f"<td{kind(n)}{color}>{escape(cell)}</td>")
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table></div>"])
