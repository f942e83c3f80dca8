"""A parity report for people (tables, in a terminal or Markdown), for CI (JUnit XML) and for the bundle's manifest."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phimoe_onnx import bundle as bundles
from phimoe_onnx.bundle import Manifest
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.parity.comparison import Comparison
from phimoe_onnx.parity.thresholds import Thresholds

COLUMNS = ("", "mean |d| / std", "max |d| / std", "KL, nats", "top-1 agreement")


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        tokens: how many tokens were run, in windows of `windows` tokens.
        bundle_to_reference: what a user of the bundle sees.
        bundle_to_stored: the kernels alone, against PyTorch over the stored weights and cache; None where those are the
            reference's.
        stored_to_reference: the rounding of weights and cache alone, with the reference's choice of experts replayed.
        routing_agreement: the share of tokens and layers whose two experts stay the same with the stored weights.
        perplexity: of "reference", "stored" and "bundle"; of text-generation, like `greedy`.
        greedy: "prompt", "reference" and "bundle" as text, and "agreeing", the number of equal tokens at the start.
        notes: what else a reader must know, such as which figures are bounds.
        failures: the thresholds that were passed, in words; empty means success.
    """

    bundle: str
    reference: str
    task: str
    quantize: str
    target: str
    tokens: int
    windows: list[int]
    thresholds: Thresholds
    bundle_to_reference: Comparison
    bundle_to_stored: Comparison | None
    stored_to_reference: Comparison | None
    routing_agreement: float | None
    perplexity: dict[str, float]
    greedy: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def empty_report(
    bundle: object, reference: object, manifest: Manifest, windows: list[list[int]], limits: Thresholds, *, stored: bool
) -> Report:
    """A report before anything is compared; `stored` says whether there will be PyTorch over the stored weights."""
    return Report(
        bundle=str(bundle),
        reference=str(reference),
        task=manifest.task,
        quantize=manifest.quantize,
        target=manifest.target,
        tokens=sum(len(window) for window in windows),
        windows=[len(window) for window in windows],
        thresholds=limits,
        bundle_to_reference=Comparison(),
        bundle_to_stored=Comparison() if stored else None,
        stored_to_reference=Comparison() if stored else None,
        routing_agreement=None,
        perplexity={},
    )


def show(report: Report, console: Console) -> None:
    """Prints the report as tables."""
    title = f"{report.bundle} ({report.target}, {report.quantize}) against {report.reference}"
    table = Table(
        title=title, caption=f"{report.tokens} tokens in {len(report.windows)} windows of up to {max(report.windows)}"
    )
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    for line in _lines(report):
        console.print(line)
    if report.greedy:
        greedy = Table(title=_greedy(report), show_lines=True)
        greedy.add_column("reference", ratio=1)
        greedy.add_column("bundle", ratio=1)
        greedy.add_row(Text(report.greedy["reference"]), Text(report.greedy["bundle"]))
        console.print(greedy)
    for failure in report.failures:
        console.print(f"[red]FAILED[/red] {failure}")
    if not report.failures:
        console.print("[green]passed[/green]")


def markdown(report: Report) -> str:
    """The report as GitHub's Markdown."""
    outcome = "failed" if report.failures else "passed"
    parts = [f"### phimoe-verify: `{report.bundle}` ({report.target}, {report.quantize}) {outcome}"]
    parts += [f"**{failure}**" for failure in report.failures]
    parts.append(
        f"{report.tokens} tokens in {len(report.windows)} windows of up to {max(report.windows)}, against "
        f"`{report.reference}`:"
    )
    table = [COLUMNS, ("---", *["--:"] * (len(COLUMNS) - 1)), *_rows(report)]
    parts.append("\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in table))
    if lines := list(_lines(report)):
        parts.append("\n".join(f"- {line}" for line in lines))
    if report.greedy:
        texts = "".join(f"\n{name}:\n<pre>{html.escape(report.greedy[name])}</pre>" for name in ("reference", "bundle"))
        parts.append(f"<details><summary>{_greedy(report)}</summary>\n{texts}\n</details>")
    return "\n\n".join(parts) + "\n"


def junit(report: Report) -> str:
    """One test case for each threshold that is set, as JUnit XML."""
    limits = {name: limit for name, limit in dataclasses.asdict(report.thresholds).items() if limit is not None}
    suite = ElementTree.Element(
        "testsuite", name="phimoe-verify", tests=str(len(limits)), failures=str(len(report.failures))
    )
    for name, limit in limits.items():
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"phimoe-verify.{report.target}.{report.quantize}", name=f"{name} <= {limit:g}"
        )
        for failure in report.failures:
            if failure.startswith(f"{name} "):
                ElementTree.SubElement(case, "failure", message=failure)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def record(report: Report, bundle: Path) -> None:
    """Writes the summary into the bundle's manifest; raises BundleError where it cannot be written."""
    summary: dict[str, Any] = {
        "tokens": report.tokens,
        "passed": not report.failures,
        "perplexity": report.perplexity,
        "bundle_to_reference": dataclasses.asdict(report.bundle_to_reference),
    }
    if report.notes:
        summary["notes"] = report.notes
    bundles.record(bundle, "parity", summary)


def find_failures(report: Report) -> Iterator[str]:
    """The thresholds that the report passes, in words.

    Raises:
        PhiMoEError: a threshold is set for what the task does not have.
    """
    measured = {
        "mean_difference": report.bundle_to_reference.mean_difference,
        "max_difference": report.bundle_to_reference.max_difference,
        "kernel_difference": report.bundle_to_stored.mean_difference if report.bundle_to_stored else 0.0,
        "kl": report.bundle_to_reference.kl,
        "kernel_kl": report.bundle_to_stored.kl if report.bundle_to_stored else 0.0,
        "perplexity_ratio": report.perplexity["bundle"] / report.perplexity["reference"] if report.perplexity else None,
    }
    for name, value in measured.items():
        limit = getattr(report.thresholds, name)
        if limit is not None and value is None:
            raise PhiMoEError(f"there is no {name} to check of a bundle for {report.task}")
        if limit is not None and not value <= limit:  # not a NaN either
            yield f"{name} is {value:.3g}, allowed is {limit:.3g}"


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    for name, comparison in _comparisons(report).items():
        differences = (comparison.mean_difference, comparison.max_difference, comparison.kl)
        agreement = "" if comparison.top1_agreement is None else f"{comparison.top1_agreement:.2%}"
        yield (name, *("" if value is None else f"{value:.2e}" for value in differences), agreement)


def _lines(report: Report) -> Iterator[str]:
    if report.perplexity:
        yield "perplexity: " + ", ".join(f"{name} {value:.4f}" for name, value in report.perplexity.items())
    if report.routing_agreement is not None:
        yield f"choices of experts that the stored weights leave unchanged: {report.routing_agreement:.2%}"
    yield from report.notes


def _greedy(report: Report) -> str:
    return f"greedy continuations, {report.greedy['agreeing']} of {report.greedy['new_tokens']} tokens equal"


def _comparisons(report: Report) -> dict[str, Comparison]:
    named = {
        "bundle to reference": report.bundle_to_reference,
        "bundle to PyTorch over the stored weights": report.bundle_to_stored,
        "stored weights to reference, routing replayed": report.stored_to_reference,
    }
    return {name: comparison for name, comparison in named.items() if comparison is not None}
