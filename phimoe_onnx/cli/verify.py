"""phimoe-verify: a bundle against the checkpoint it came from, on real text; exit code 1 past the thresholds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import phimoe_onnx
from phimoe_onnx.bundle import unchanged
from phimoe_onnx.cli._common import DEVICES, Parser, positive, run, wrapped
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.cli._start import imports
from phimoe_onnx.errors import BundleError, PhiMoEError
from phimoe_onnx.parity.thresholds import MEASURES, UNITS, default_thresholds, shown_defaults

if TYPE_CHECKING:
    from phimoe_onnx.parity.report import Report

# what stands in the beginning of each of the reports
MARKS = {
    "json": '{\n  "written_by": "phimoe-verify"',
    "markdown": "### phimoe-verify: `",
    "junit": '<testsuite name="phimoe-verify"',
    "html": "<!doctype html>\n<!-- phimoe-verify -->",
}
OF_THE_REFERENCE = ("adapter", "text", "tokens", "new_tokens", "save_golden")  # options that go with --reference


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = Parser(
        "phimoe-verify",
        "Hold a bundle against the checkpoint that it came from, on real text. The exit code is 1 if a difference is "
        "past its threshold.",
        "austen-int4 --reference models/phimoe-austen",
        "BUNDLE --reference CHECKPOINT --junit parity.xml --max-kl 0.05",
        "BUNDLE --reference CHECKPOINT --html report.html",
        "BUNDLE --reference CHECKPOINT --save-golden model.golden",
        "BUNDLE --golden model.golden",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--reference", metavar="CHECKPOINT", help="the folder of the checkpoint")
    source.add_argument("--golden", metavar="FILE", help="what --save-golden kept of it; needs no PyTorch")
    add("--save-golden", metavar="FILE", help="keep of the checkpoint what --golden needs, a few MB (default: none)")
    add("--adapter", metavar="FOLDER", help="the LoRA adapter that phimoe-export merged into it (default: none)")
    add("--text", metavar="FILE", help="UTF-8 text to run (default: two chapters of Persuasion)")
    add("--tokens", type=positive, metavar="N", help="how many tokens of it at the most (default: 4096)")
    add("--new-tokens", type=positive, metavar="N", help="length of the greedy continuations (default: 64)")
    add("--device", default="cpu", choices=DEVICES, help="where the bundle runs (default: cpu)")
    add("--junit", metavar="FILE", help="write JUnit XML (default: none)")
    add("--markdown", metavar="FILE", help="write the tables as Markdown (default: none)")
    add("--json", metavar="FILE", help="write the whole report as JSON (default: none)")
    add("--html", metavar="FILE", help="write it as one page to look at, with what stands behind it (default: none)")
    add("--overwrite", action="store_true", help="write these files over others; over earlier reports they always are")
    limits = parser.add_argument_group(
        "thresholds",
        wrapped(
            "The most that is allowed; what is within it passes. The defaults follow from the narrowest weights of the "
            "bundle. They are wider for a cache of integers, and others for outputs that are no distribution. "
            f"Units: {UNITS}"
        ),
    )
    for name, (unit, meaning) in MEASURES.items():
        limits.add_argument(
            f"--max-{name.replace('_', '-')}",
            type=float,
            metavar=unit.upper(),
            help=f"{meaning} (default: {shown_defaults(name)})",
        )
    return run(_verify, parser, argv)


def _verify(arguments: argparse.Namespace) -> None:
    if arguments.save_golden:
        from phimoe_onnx.parity.golden import MARK

        check_file(arguments.save_golden, MARK, arguments.overwrite)
    files = {kind: file for kind in MARKS if (file := getattr(arguments, kind))}
    for kind, file in files.items():
        check_file(file, MARKS[kind], arguments.overwrite)
    report = _compare(arguments)
    with imports():
        from phimoe_onnx.parity import page
        from phimoe_onnx.parity import report as reports

    reports.show(report, Console())
    written = {"written_by": "phimoe-verify", **report.as_dict()}
    texts = {
        "json": lambda: json.dumps(written, indent=2, ensure_ascii=False) + "\n",
        "markdown": lambda: reports.markdown(report),
        "junit": lambda: reports.junit(report),
        "html": lambda: page.page(report),
    }
    for kind, file in files.items():
        write_file(file, texts[kind](), MARKS[kind], arguments.overwrite)
    bundle = Path(arguments.bundle)
    try:
        reports.record(report, bundle)
    except BundleError as error:
        print(f"note: the summary is not in the manifest: {error}", file=sys.stderr)
    if report.failures:
        raise PhiMoEError(f"{bundle}: " + "; ".join(report.failures))


def _compare(arguments: argparse.Namespace) -> Report:
    if arguments.golden:
        for name in OF_THE_REFERENCE:
            if getattr(arguments, name) is not None:
                raise PhiMoEError(f"--{name.replace('_', '-')} goes with --reference; --golden has its own text")
    with imports():  # they say what is missing where a package is
        compare = phimoe_onnx.verify_golden if arguments.golden else phimoe_onnx.verify
    bundle = Path(arguments.bundle)
    given = {name: value for name in MEASURES if (value := getattr(arguments, f"max_{name}")) is not None}
    options = {name: value for name in OF_THE_REFERENCE if (value := getattr(arguments, name)) is not None}
    if arguments.text:
        options["text"] = _read(arguments.text)
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with (
        unchanged(bundle) as manifest,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        return compare(
            bundle,
            arguments.golden or arguments.reference,
            device=arguments.device,
            thresholds=dataclasses.replace(default_thresholds(manifest), **given),
            progress=_shown(bar),
            **options,
        )


def _shown(bar: Progress) -> Callable[[str, int, int], None]:
    """Shows what `verify` reports; each kind of work has its own speed, by which the time left is told."""
    task, kind = bar.add_task("loading", total=None), ""

    def show(what: str, done: int, total: int) -> None:
        nonlocal kind
        if kind != what.partition(",")[0]:
            kind = what.partition(",")[0]
            bar.reset(task)
        bar.update(task, description=what, completed=done, total=total)

    return show


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhiMoEError(f"--text {file}: cannot be read ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
