"""A parity report as one page for people: no script, no font, no network, and nothing that only colour tells."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import takewhile

from phimoe_onnx._version import __version__
from phimoe_onnx.page_parts import document, table
from phimoe_onnx.parity.evidence import Divergence, Passage, Routing, Token, WeightError
from phimoe_onnx.parity.report import COLUMNS, Check, Report, comparison_rows, remarks, token_count
from phimoe_onnx.parity.thresholds import MEASURES

MARK = "<!doctype html>\n<!-- phimoe-verify -->"
LEVELS = 6  # of the tokens' colour
WORST = 3  # tokens of a passage that are told apart
BAR, HEIGHT = 22, 90  # of the histogram, in its own units
LIMIT = 100  # of the bars beside the thresholds, in theirs; they end at half as much again

STYLE = (
    """
:root { --good: #1c7a3d; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --good: #6fce8f; --bad: #ff8a80; } }
.verdict { display: inline-block; color: var(--page); font-weight: 700; border-radius: 6px; padding: 4px 12px;
  margin: 8px 0 10px; }
.good { background: var(--good); fill: var(--good); } .bad { background: var(--bad); fill: var(--bad); }
td.good, td.bad { background: none; font-weight: 600; } td.good { color: var(--good); } td.bad { color: var(--bad); }
dl { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); margin: 14px 0 0; }
dl > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
dt { color: var(--soft); font-size: 0.86rem; } dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
dd small { font-size: 0.8rem; color: var(--soft); display: block; }
.beside { display: grid; gap: 0 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
section { min-width: 0; display: flex; flex-direction: column; }
.beside tbody th { white-space: normal; min-width: 6em; }
.map tbody th { min-width: 0 !important; }
.card > .text + .wide { margin-top: 10px; } ul { margin: 10px 0 0; padding-left: 20px; font-size: 0.86rem; }
.large text { font-size: 15px; } .limits svg { width: 150px; height: 12px; vertical-align: middle; }
.map table { min-width: 0; } .map td { padding: 3px 6px; border-left: 2px solid var(--card); min-width: 2.1em; }
.text { color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; max-width: none;
  font-size: 1rem !important; }
.text span, .key span { border-radius: 3px; padding: 2px 0; } .key span { padding: 2px 8px; color: var(--ink); }
.key { display: flex; flex-wrap: wrap; gap: 2px; font-size: 0.86rem; align-items: center; }
mark { background: rgb(var(--heat) / 0.35); color: inherit; border-radius: 3px; }
"""
    + "".join(f".k{n} {{ background: rgb(var(--heat) / {0.5 * n / LEVELS:.2f}); }}\n" for n in range(1, LEVELS + 1))
    + f".k{LEVELS} {{ text-decoration: underline 2px; text-underline-offset: 4px; }}\n"
)


def page(report: Report) -> str:
    """The page, HTML of one file."""
    return document(f"{report.bundle} against {report.reference}", MARK, _parts(report), STYLE)


def _parts(report: Report) -> Iterator[str]:
    evidence = report.evidence
    yield from _verdict(report)
    yield '<div class="beside">'
    yield from _section(_limits(report.checks))
    yield from _section(_comparisons(report))
    if evidence is None:
        yield "</div>"
        return
    if evidence.weights:
        yield from _section(_weights(evidence.weights))
    if evidence.divergence is not None:
        yield from _section(_divergence(evidence.divergence))
    yield "</div>"
    yield from _experts(evidence.routing)
    if evidence.passages:
        yield from _passages(evidence.passages)
    if report.greedy:
        yield from _greedy(report)


def _section(parts: Iterable[str]) -> Iterator[str]:
    yield "<section>"
    yield from parts
    yield "</section>"


def _verdict(report: Report) -> Iterator[str]:
    count = len(report.checks)
    words = f"{count - len(report.failures)} of {count} limits hold"
    good = not report.failures
    yield f'<p class="verdict {"good" if good else "bad"}">{"Passed" if good else "Failed"}: {words}</p>'
    yield (
        f"<p>A bundle for {escape(report.target)}, weights {escape(report.quantize)}, {escape(report.task)}. "
        f"{token_count(report)}. phimoe-onnx {__version__}.</p>"
    )
    if report.failures:
        yield "<ul>" + "".join(f"<li>{escape(failure)}</li>" for failure in report.failures) + "</ul>"
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in _figures(report)
    )
    yield f"<dl>{figures}</dl>"


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    evidence = report.evidence
    if report.perplexity:
        before, after = report.perplexity["reference"], report.perplexity["bundle"]
        yield "Perplexity", f"{after / before - 1:+.2%}", f"{before:.3f} to {after:.3f}"
    if evidence and evidence.divergence:
        spread = evidence.divergence
        yield "KL, mean", f"{spread.mean:.3g}", "nats a token"
        yield "KL, median", f"{spread.median:.3g}", "nats"
        yield "KL, 99.9 %", f"{spread.q999:.3g}", "nats; one token in 1000 has more"
    if report.bundle_to_reference.top1_agreement is not None:
        yield "Same best token", f"{report.bundle_to_reference.top1_agreement:.2%}", "top-1 agreement"
    if report.routing_agreement is not None:
        yield "Same experts", f"{report.routing_agreement:.2%}", "of the choices, stored weights"
    if evidence and evidence.weights:
        weights = sum(each.weights for each in evidence.weights)
        bits = sum(each.weights * each.bits for each in evidence.weights) / weights
        yield "Bits a weight", f"{bits:.2f}", "experts, attention, head; with scales"
    if report.greedy:
        yield "Greedy tokens", f"{report.greedy['agreeing']} of {report.greedy['new_tokens']}", "equal at the start"


def _limits(checks: Sequence[Check]) -> Iterator[str]:
    yield "<h2>Limits</h2>"
    if not checks:
        yield "<p>No threshold was set.</p>"
        return
    yield "<p>What was held against a threshold. The line in each bar is the limit.</p>"
    yield '<div class="card limits"><div class="wide" tabindex="0" role="region" aria-label="Limits"><table><thead><tr>'
    yield '<th scope="col">threshold</th><th scope="col" class="words">outcome</th><th scope="col">measured</th>'
    yield '<th scope="col">limit</th><th scope="col" class="words">unit</th><td></td></tr></thead><tbody>'
    for check in checks:
        unit, meaning = MEASURES[check.name]
        outcome = "good" if check.passed else "bad"
        yield (
            f'<tr><th scope="row" title="{escape(meaning)}">{check.name}</th>'
            f'<td class="words {outcome}">{"passed" if check.passed else "failed"}</td><td>{check.measured:.3g}</td>'
            f'<td>{check.limit:.3g}</td><td class="words">{unit}</td><td>{_bar(check)}</td></tr>'
        )
    yield "</tbody></table></div></div>"


def _bar(check: Check) -> str:
    """How much of the limit is used; a ratio's is what is above 1."""
    base = 1.0 if MEASURES[check.name].unit == "ratio" else 0.0
    used, room = check.measured - base, check.limit - base
    share = used / room if room > 0 else float(used > 0) * 2
    width = 1.5 * LIMIT if math.isnan(share) else LIMIT * min(max(share, 0.0), 1.5)
    return (
        f'<svg viewBox="0 0 {1.5 * LIMIT:g} 12" aria-hidden="true"><rect class="base" width="{1.5 * LIMIT:g}" '
        f'height="12"/><rect class="{"good" if check.passed else "bad"}" width="{width:.1f}" height="12"/>'
        f'<path stroke="var(--ink)" stroke-width="2" d="M{LIMIT} 0V12"/></svg>'
    )


def _comparisons(report: Report) -> Iterator[str]:
    yield "<h2>Where the difference comes from</h2>"
    yield (
        "<p>What a user sees is the first row. The kernels alone are in the second, the rounding of the weights and "
        "the cache alone in the third, where there is any. Differences are in standard deviations of the reference's "
        "outputs.</p>"
    )
    yield f'<div class="card">{table("Comparisons", COLUMNS, comparison_rows(report))}'
    if notes := list(remarks(report)):
        yield "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"
    yield "</div>"


def _weights(weights: Sequence[WeightError]) -> Iterator[str]:
    kinds = list(dict.fromkeys(each.kind for each in weights if each.layer is not None))
    found: dict[int, dict[str, WeightError]] = defaultdict(dict)
    for each in weights:
        if each.layer is not None:
            found[each.layer][each.kind] = each
    most = max((each.error for each in weights if math.isfinite(each.error)), default=0.0) or 1.0
    yield "<h2>Error by layer and kind of weight</h2>"
    yield (
        "<p>How far the outputs of each matrix are from those of the checkpoint's, relative, when both are given the "
        "checkpoint's inputs. A stack of experts has one figure. Under it the bits a weight, scales counted in.</p>"
    )

    def shown(each: WeightError | None) -> str:
        return "" if each is None else f"{each.error:.2%}"

    def depth(each: WeightError | None) -> float | None:
        return None if each is None or not math.isfinite(each.error) else each.error / most

    rows = [(str(layer), *(shown(of.get(kind)) for kind in kinds)) for layer, of in found.items()]
    shades = [[depth(of.get(kind)) for kind in kinds] for of in found.values()]
    rows.append(("bits", *(_range([of[kind].bits for of in found.values() if kind in of]) for kind in kinds)))
    shades.append([None] * len(kinds))
    yield f'<div class="card map">{table("Error by layer and kind of weight", ("layer", *kinds), rows, shades=shades)}'
    for each in weights:
        if each.layer is None:
            yield f"<p>{escape(each.kind)}: {each.error:.2%} at {each.bits:.2f} bits.</p>"
    yield "</div>"


def _range(bits: Sequence[float]) -> str:
    least, most = f"{min(bits):.2f}", f"{max(bits):.2f}"
    return least if least == most else f"{least} to {most}"


def _divergence(spread: Divergence) -> Iterator[str]:
    most, total = max(spread.counts), sum(spread.counts)
    width, floor = BAR * len(spread.counts), 4 + HEIGHT
    named = [f"below {spread.bins[0]:.2g}"]
    named += [f"{low:.2g} to {high:.2g}" for low, high in zip(spread.bins, spread.bins[1:], strict=False)]
    named.append(f"{spread.bins[-1]:.2g} and more")
    yield "<h2>KL token by token</h2>"
    yield (
        f"<p>The KL divergence says how far the bundle's probabilities for the next token are from the checkpoint's. "
        f"The bars count the tokens by it, on a logarithmic scale. The median is {spread.median:.3g}, the mean "
        f"{spread.mean:.3g}, 99.9 % of the tokens are below {spread.q999:.3g}, and the largest is {spread.largest:.3g} "
        f"nats.</p>"
    )
    box = f"-20 0 {width + 40} {floor + 24}"
    yield f'<div class="card"><svg class="large" viewBox="{box}" role="img" aria-label="KL of the tokens">'
    for n, (name, count) in enumerate(zip(named, spread.counts, strict=True)):
        height = HEIGHT * count / most
        yield (
            f'<rect class="more" x="{BAR * n}" y="{floor - height:.1f}" width="{BAR - 2}" height="{height:.1f}">'
            f"<title>{name} nats: {count / total:.1%}</title></rect>"
        )
    for n, edge in enumerate(spread.bins):
        if n % 4 == 0:
            x = BAR * (n + 1) - 1
            yield f'<text x="{x}" y="{floor + 17}" text-anchor="middle">{edge:.0e}</text>'
    yield "</svg><details><summary>As a table</summary>"
    rows = [
        (name, str(count), f"{count / total:.2%}") for name, count in zip(named, spread.counts, strict=True) if count
    ]
    yield table("KL of the tokens", ("nats", "tokens", "share"), rows) + "</details></div>"


def _experts(routing: Routing) -> Iterator[str]:
    number = len(routing.reference[0])
    both = [routing.reference, routing.stored or []]
    most = max(share for shares in both for row in shares for share in row)
    yield "<h2>Experts</h2>"
    yield (
        f"<p>Each expert's share of the choices of a layer, in %. Each token chooses two of {number}, so even use "
        f"would be {1 / number:.1%}.</p>"
    )
    yield '<div class="cards">'
    columns = ("layer", *map(str, range(number)))
    yield _shares("Checkpoint", columns, routing.reference, most)
    if routing.stored and routing.agreement:
        yield _shares("Weights as the bundle stores them", columns, routing.stored, most, routing.agreement)
    yield "</div>"


def _shares(
    name: str,
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    most: float,
    agreement: Sequence[float] = (),
) -> str:
    rows = [[str(layer), *(f"{100 * share:.0f}" for share in row)] for layer, row in enumerate(shares)]
    shades: list[list[float | None]] = [[share / most for share in row] for row in shares]
    more = ""
    if agreement:
        same = ", ".join(f"layer {layer} {share:.1%}" for layer, share in enumerate(agreement))
        more = f"<p>Tokens whose two experts are the checkpoint's: {same}.</p>"
    shown = table(f"Experts, {name.lower()}", columns, rows, shades=shades)
    return f'<div class="card map"><h3>{name}</h3>{shown}{more}</div>'


def _passages(passages: Sequence[Passage]) -> Iterator[str]:
    most = max(token.kl for passage in passages for token in passage.tokens)
    yield "<h2>The worst passages</h2>"
    yield (
        "<p>Where the bundle is farthest from the checkpoint, on average over "
        f"{max(len(passage.tokens) for passage in passages)} tokens. A token's colour is the KL of what the two expect "
        "in its place; the deepest is underlined, too.</p>"
    )
    if most > 0:
        steps = (f'<span class="k{n}">{most * (n / LEVELS) ** 2:.2g}</span>' for n in range(1, LEVELS + 1))
        yield f'<div class="key">nats, up to: {"".join(steps)}</div>'
    yield '<div class="cards" style="margin-top:12px">'
    for passage in passages:
        yield f'<div class="card"><h3>KL {passage.kl:.3g} <span>window {passage.window}, from token {passage.start}'
        yield f'</span></h3><p class="text">{"".join(_token(token, most) for token in passage.tokens)}</p>'
        worst = sorted(passage.tokens, key=lambda token: -token.kl)[:WORST]
        rows = [(_quoted(t.text), f"{t.kl:.3g}", _quoted(t.reference), _quoted(t.bundle)) for t in worst]
        yield table("The largest KL", ("in the text", "KL", "checkpoint expects", "bundle"), rows, words=(2, 3))
        yield "</div>"
    yield "</div>"


def _token(token: Token, most: float) -> str:
    level = math.ceil(LEVELS * math.sqrt(max(token.kl, 0.0) / most)) if most > 0 and math.isfinite(token.kl) else 0
    if not level:
        return escape(token.text)
    said = f"KL {token.kl:.3g}; checkpoint: {_quoted(token.reference)}, bundle: {_quoted(token.bundle)}"
    return f'<span class="k{min(level, LEVELS)}" title="{escape(said)}">{escape(token.text)}</span>'


def _quoted(text: str) -> str:
    return "“" + text.replace("\n", "⏎") + "”"


def _greedy(report: Report) -> Iterator[str]:
    greedy = report.greedy
    reference, bundle = greedy["reference"], greedy["bundle"]
    parts = greedy["agreeing"] < greedy["new_tokens"]
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(reference, bundle, strict=False))
    common = "".join(letter for letter, _ in pairs)
    common = common[: common.rfind(" ") + 1] if parts else bundle  # tokens that part may share letters
    yield "<h2>Greedy continuations</h2>"
    if parts:
        yield (
            f"<p>Always the likeliest token. The two part after {greedy['agreeing']} of {greedy['new_tokens']} tokens, "
            "at what is marked; the checkpoint's text is known to there.</p>"
        )
    else:
        yield f"<p>Always the likeliest token. All {greedy['new_tokens']} tokens are equal.</p>"
    yield '<div class="cards">'
    for name, text in (("Checkpoint", reference), ("Bundle", bundle)):
        rest = text[len(common) :]
        more = f"<mark>{escape(rest)}</mark>" + ("…" if name == "Checkpoint" else "") if parts else ""
        prompt = f'<span class="soft">{escape(greedy["prompt"])}</span>'
        yield f'<div class="card"><h3>{name}</h3><p class="text">{prompt}{escape(common)}{more}</p></div>'
    yield "</div>"
