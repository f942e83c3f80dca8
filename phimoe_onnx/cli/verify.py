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
from phimoe_onnx.cli._common import run
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.errors import BundleError, PhiMoEError

if TYPE_CHECKING:
    from phimoe_onnx.parity.report import Report

# what stands in the beginning of each of the reports
MARKS = {
    "json": '{\n  "written_by": "phimoe-verify"',
    "markdown": "### phimoe-verify: `",
    "junit": '<testsuite name="phimoe-verify"',
}
OF_THE_REFERENCE = ("adapter", "text", "tokens", "new_tokens", "save_golden")  # options that go with --reference
LIMITS = ("mean_difference", "max_difference", "kernel_difference", "kl", "kernel_kl", "perplexity_ratio")


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = argparse.ArgumentParser(prog="phimoe-verify", description=__doc__)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--reference", metavar="CHECKPOINT", help="the folder of the checkpoint")
    source.add_argument("--golden", metavar="FILE", help="what --save-golden kept of it; needs no PyTorch")
    add("--save-golden", metavar="FILE", help="keep of the checkpoint what --golden needs, in a few MB")
    add("--adapter", metavar="FOLDER", help="the LoRA adapter that phimoe-export merged into it")
    add("--text", metavar="FILE", help="UTF-8 text to run (default: two chapters of Persuasion)")
    add("--tokens", type=int, metavar="N", help="how many tokens of it at the most (default: 4096)")
    add("--new-tokens", type=int, metavar="N", help="length of the greedy continuations (default: 64)")
    add("--device", default="cpu", metavar="DEVICE", help="where the bundle runs: cpu (default) or cuda")
    add("--junit", metavar="FILE", help="write JUnit XML")
    add("--markdown", metavar="FILE", help="write the tables as Markdown")
    add("--json", metavar="FILE", help="write the whole report as JSON")
    add("--overwrite", action="store_true", help="write these files over others; over earlier reports they always are")
    for name in LIMITS:
        add(
            f"--max-{name.replace('_', '-')}",
            type=float,
            metavar="X",
            help="override the precision's default threshold",
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
    from phimoe_onnx.parity import report as reports

    reports.show(report, Console())
    written = {"written_by": "phimoe-verify", **report.as_dict()}
    texts = {
        "json": lambda: json.dumps(written, indent=2, ensure_ascii=False) + "\n",
        "markdown": lambda: reports.markdown(report),
        "junit": lambda: reports.junit(report),
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
    compare = phimoe_onnx.verify_golden if arguments.golden else phimoe_onnx.verify  # says what is missing
    from phimoe_onnx.parity.thresholds import default_thresholds

    bundle = Path(arguments.bundle)
    given = {name: value for name in LIMITS if (value := getattr(arguments, f"max_{name}")) is not None}
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
