"""A parity report for people (tables, in a terminal or Markdown), for CI (JUnit XML) and for the bundle's manifest."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Iterator, Sequence
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
from phimoe_onnx.parity.evidence import Evidence
from phimoe_onnx.parity.thresholds import MEASURES, Thresholds

COLUMNS = ("", "mean |d|, std", "max |d|, std", "KL, nats", "same top-1")
CHECKS = ("threshold", "measured", "limit", "unit", "")


@dataclass(frozen=True)
class Check:
    """A measure beside its limit, both in the unit of MEASURES; `passed` where it is no more than that."""

    name: str
    measured: float
    limit: float
    passed: bool

    def failure(self) -> str:
        """That it is past its limit, in words."""
        return f"{self.name} is {self.measured:.3g}, allowed is {self.limit:.3g}"


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
        greedy: "prompt", "reference" and "bundle" as text, the reference's up to the token with which the two part;
            "agreeing", the number of equal tokens at the start, and "new_tokens", of how many.
        evidence: what stands behind the averages.
        notes: what else a reader must know, such as which figures are bounds.
        checks: what was held against a threshold.
        failures: those that are past their limit, in words; empty means success.
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
    evidence: Evidence | None = None
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
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
    console.print(title, highlight=False, markup=False)
    console.print(f"{token_count(report)}\n", highlight=False)
    console.print(_table(COLUMNS, comparison_rows(report)))
    console.print()
    for line in remarks(report):
        console.print(line, highlight=False)
    if report.greedy:
        console.print(_greedy(report), highlight=False)
        greedy = Table("reference", "bundle")
        for column in greedy.columns:
            column.ratio = 1
        greedy.add_row(Text(report.greedy["reference"]), Text(report.greedy["bundle"]))
        console.print(greedy)
    console.print()
    verdicts = {True: "[green]passed[/green]", False: "[red]FAILED[/red]"}
    console.print(_table(CHECKS, ((*row, verdicts[check.passed]) for check, row in _checked(report))))
    console.print(f"\n{verdicts[not report.failures]}", highlight=False)


def markdown(report: Report) -> str:
    """The report as GitHub's Markdown."""
    outcome = "failed" if report.failures else "passed"
    parts = [f"### phimoe-verify: `{report.bundle}` ({report.target}, {report.quantize}) {outcome}"]
    parts += [f"**{failure}**" for failure in report.failures]
    verdicts = {True: "passed", False: "**failed**"}
    parts.append(_markdown_table(CHECKS, [(*row, verdicts[check.passed]) for check, row in _checked(report)]))
    parts.append(f"{token_count(report)}, against `{report.reference}`:")
    parts.append(_markdown_table(COLUMNS, list(comparison_rows(report))))
    if lines := list(remarks(report)):
        parts.append("\n".join(f"- {line}" for line in lines))
    if report.greedy:
        texts = "".join(f"\n{name}:\n<pre>{html.escape(report.greedy[name])}</pre>" for name in ("reference", "bundle"))
        parts.append(f"<details><summary>{_greedy(report)}</summary>\n{texts}\n</details>")
    return "\n\n".join(parts) + "\n"


def junit(report: Report) -> str:
    """One test case for each threshold that is set, with what was measured, as JUnit XML."""
    suite = ElementTree.Element(
        "testsuite", name="phimoe-verify", tests=str(len(report.checks)), failures=str(len(report.failures))
    )
    for check in report.checks:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"phimoe-verify.{report.target}.{report.quantize}",
            name=f"{check.name} <= {check.limit:g}",
        )
        unit, meaning = MEASURES[check.name]
        properties = ElementTree.SubElement(case, "properties")
        for name, value in {"measured": repr(check.measured), "limit": repr(check.limit), "unit": unit}.items():
            ElementTree.SubElement(properties, "property", name=name, value=value)
        if not check.passed:
            ElementTree.SubElement(case, "failure", message=check.failure())
        output = ElementTree.SubElement(case, "system-out")
        output.text = f"{check.name} is {check.measured:.3g} {unit}, allowed is {check.limit:.3g}: {meaning}"
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


def judge(report: Report) -> None:
    """Holds the figures of a report against its thresholds.

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
        if limit is None:
            continue
        if value is None:
            raise PhiMoEError(f"there is no {name} to check of a bundle for {report.task}")
        report.checks.append(Check(name, value, limit, bool(value <= limit)))  # False of a NaN
    report.failures = [check.failure() for check in report.checks if not check.passed]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Numbers to the right, words to the left, no wider than 80 columns with the names there are."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n and column not in ("", "unit") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ("---", *["--:"] * (len(columns) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _checked(report: Report) -> Iterator[tuple[Check, tuple[str, ...]]]:
    """Each check with its cells, but for the last."""
    for check in report.checks:
        yield check, (check.name, f"{check.measured:.3g}", f"{check.limit:.3g}", MEASURES[check.name].unit)


def token_count(report: Report) -> str:
    """How many tokens were run, in words."""
    return f"{report.tokens} tokens in {len(report.windows)} windows of up to {max(report.windows)}"


def comparison_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """The cells under `COLUMNS` of each comparison that there is."""
    for name, comparison in _comparisons(report).items():
        differences = (comparison.mean_difference, comparison.max_difference, comparison.kl)
        agreement = "" if comparison.top1_agreement is None else f"{comparison.top1_agreement:.2%}"
        yield (name, *("" if value is None else f"{value:.2e}" for value in differences), agreement)


def remarks(report: Report) -> Iterator[str]:
    """What the tables do not say."""
    if report.bundle_to_stored is not None:
        yield "stored weights run in PyTorch; beside the reference with its choice of experts"
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
        "bundle to stored weights": report.bundle_to_stored,
        "stored weights to reference": report.stored_to_reference,
    }
    return {name: comparison for name, comparison in named.items() if comparison is not None}
