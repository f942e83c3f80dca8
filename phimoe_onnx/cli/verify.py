"""phimoe-verify: a bundle against the checkpoint it came from, on real text; exit code 1 past the thresholds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import phimoe_onnx
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.cli._common import run
from phimoe_onnx.errors import BundleError, PhiMoEError

LIMITS = ("mean_difference", "max_difference", "kernel_difference", "kl", "kernel_kl", "perplexity_ratio")


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = argparse.ArgumentParser(prog="phimoe-verify", description=__doc__)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote")
    add("--reference", required=True, metavar="CHECKPOINT", help="the folder of the checkpoint")
    add("--text", metavar="FILE", help="UTF-8 text to run (default: two chapters of Persuasion)")
    add("--tokens", type=int, default=4096, metavar="N", help="how many tokens of it at the most (default: 4096)")
    add("--new-tokens", type=int, default=64, metavar="N", help="length of the greedy continuations (default: 64)")
    add("--device", default="cpu", metavar="DEVICE", help="where the bundle runs: cpu (default) or cuda")
    add("--junit", metavar="FILE", help="write JUnit XML")
    add("--markdown", metavar="FILE", help="write the tables as Markdown")
    add("--json", metavar="FILE", help="write the whole report as JSON")
    for name in LIMITS:
        add(
            f"--max-{name.replace('_', '-')}",
            type=float,
            metavar="X",
            help="override the precision's default threshold",
        )
    return run(_verify, parser, argv)


def _verify(arguments: argparse.Namespace) -> None:
    verify = phimoe_onnx.verify  # first: it says what is missing where a package is
    from phimoe_onnx.parity import report as reports
    from phimoe_onnx.parity.thresholds import default_thresholds

    bundle = Path(arguments.bundle)
    given = {name: value for name in LIMITS if (value := getattr(arguments, f"max_{name}")) is not None}
    thresholds = dataclasses.replace(default_thresholds(read_manifest(bundle)), **given)
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("comparing", total=None)
        report = verify(
            bundle,
            arguments.reference,
            text=_read(arguments.text) if arguments.text else None,
            tokens=arguments.tokens,
            new_tokens=arguments.new_tokens,
            device=arguments.device,
            thresholds=thresholds,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    reports.show(report, Console())
    if arguments.json:
        _write(arguments.json, json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    if arguments.markdown:
        _write(arguments.markdown, reports.markdown(report))
    if arguments.junit:
        _write(arguments.junit, reports.junit(report))
    try:
        reports.record(report, bundle)
    except BundleError as error:
        print(f"note: the summary is not in the manifest: {error}", file=sys.stderr)
    if report.failures:
        raise PhiMoEError(f"{bundle}: " + "; ".join(report.failures))


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhiMoEError(f"--text {file}: cannot be read ({error})") from None


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PhiMoEError(f"{file}: cannot be written ({error.strerror})") from None
