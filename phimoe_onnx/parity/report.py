"""A parity report for people (a table), for CI (JUnit XML) and for the bundle's manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.parity.verify import Comparison, Report


def show(report: Report, console: Console) -> None:
    """Prints the report as tables."""
    title = f"{report.bundle} ({report.target}, {report.quantize}) against {report.reference}"
    table = Table(title=title, caption=f"{report.tokens} tokens in {len(report.windows)} windows of up to {max(report.windows)}")
    for column in ("", "mean |d| / std", "max |d| / std", "KL, nats", "top-1 agreement"):
        table.add_column(column, justify="right" if column else "left")
    for name, comparison in _comparisons(report).items():
        table.add_row(
            name,
            f"{comparison.mean_difference:.2e}",
            f"{comparison.max_difference:.2e}",
            f"{comparison.kl:.2e}",
            f"{comparison.top1_agreement:.2%}",
        )
    console.print(table)
    console.print("perplexity: " + ", ".join(f"{name} {value:.4f}" for name, value in report.perplexity.items()))
    if report.routing_agreement is not None:
        console.print(f"choices of experts that the stored weights leave unchanged: {report.routing_agreement:.2%}")
    greedy = Table(
        title=f"greedy continuations, {report.greedy['agreeing']} of {report.greedy['new_tokens']} tokens equal", show_lines=True
    )
    greedy.add_column("reference", ratio=1)
    greedy.add_column("bundle", ratio=1)
    greedy.add_row(Text(report.greedy["reference"]), Text(report.greedy["bundle"]))
    console.print(greedy)
    for failure in report.failures:
        console.print(f"[red]FAILED[/red] {failure}")
    if not report.failures:
        console.print("[green]passed[/green]")


def junit(report: Report) -> str:
    """One test case for each threshold that is set, as JUnit XML."""
    limits = {name: limit for name, limit in dataclasses.asdict(report.thresholds).items() if limit is not None}
    suite = ElementTree.Element("testsuite", name="phimoe-verify", tests=str(len(limits)), failures=str(len(report.failures)))
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
    """Writes the summary into the bundle's manifest."""
    summary: dict[str, Any] = {
        "tokens": report.tokens,
        "passed": not report.failures,
        "perplexity": report.perplexity,
        "bundle_to_reference": dataclasses.asdict(report.bundle_to_reference),
    }
    dataclasses.replace(read_manifest(bundle), parity=summary).write(bundle)


def _comparisons(report: Report) -> dict[str, Comparison]:
    named = {
        "bundle to reference": report.bundle_to_reference,
        "bundle to PyTorch over the stored weights": report.bundle_to_stored,
        "stored weights to reference, routing replayed": report.stored_to_reference,
    }
    return {name: comparison for name, comparison in named.items() if comparison is not None}
