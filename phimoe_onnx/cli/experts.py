"""phimoe-experts: which experts a text uses."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from phimoe_onnx.bundle import Manifest, unchanged
from phimoe_onnx.cli._common import Parser, positive, run
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.cli._start import imports
from phimoe_onnx.errors import MissingPackageError, PhiMoEError

if TYPE_CHECKING:
    from phimoe_onnx.analytics.routing import Usage

# what stands in the beginning of each of the reports
MARKS = {"json": '{\n  "written_by": "phimoe-experts"', "html": "<!doctype html>\n<!-- phimoe-experts -->"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = Parser(
        "phimoe-experts",
        "Show which experts a text uses: their shares in each layer, the pairs that are chosen together, and how near "
        "other experts were. Several texts, one a domain for example, are also held against each other.",
        "austen-int4 --text persuasion.txt",
        "BUNDLE --text prose.txt --text code.py --html experts.html",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote, with a graph for the CPU")
    add(
        "--text",
        metavar="FILE",
        action="append",
        required=True,
        help="UTF-8 text to run; may be repeated. A text longer than the context is read in pieces of its length",
    )
    add("--tokens", type=positive, metavar="N", help="how many tokens of each at the most (default: all)")
    add("--threads", type=positive, metavar="N", help="threads for one operator (default: ONNX Runtime's choice)")
    add("--json", metavar="FILE", help="write all figures as JSON (default: none)")
    add("--html", metavar="FILE", help="write them as one page with heat maps (default: none)")
    add("--overwrite", action="store_true", help="write these files over others; over earlier reports they always are")
    return run(_experts, parser, argv)


def _experts(arguments: argparse.Namespace) -> None:
    files = {kind: file for kind in MARKS if (file := getattr(arguments, kind))}
    for kind, file in files.items():
        check_file(file, MARKS[kind], arguments.overwrite)
    texts = {file: _read(file) for file in arguments.text}
    with imports():
        try:
            from phimoe_onnx.analytics import page, report
        except ModuleNotFoundError as error:
            raise MissingPackageError(f"phimoe-experts needs {error.name}; pip install 'phimoe-onnx[cpu]'") from None

    with unchanged(Path(arguments.bundle)) as manifest:
        found = report.Report(
            arguments.bundle, manifest.source, manifest.target, manifest.quantize, *_run(arguments, manifest, texts)
        )
    for line in report.lines(found):
        print(line)
    written = {"written_by": "phimoe-experts", **report.as_dict(found)}
    contents = {
        "json": lambda: json.dumps(written, indent=2, ensure_ascii=False) + "\n",
        "html": lambda: page.page(found),
    }
    for kind, file in files.items():
        write_file(file, contents[kind](), MARKS[kind], arguments.overwrite)


def _run(arguments: argparse.Namespace, manifest: Manifest, texts: dict[str, str]) -> tuple[float, list[Usage]]:
    """The router's eps, and what each text uses."""
    from phimoe_onnx.analytics.routing import read_usage
    from phimoe_onnx.runtime.probe import Probe
    from phimoe_onnx.text.tokenizer import Tokenizer

    folder, decoding = Path(arguments.bundle), manifest.decoding
    tokenizer = Tokenizer(folder, decoding.hidden_tokens.values())
    probe = Probe.open(folder, manifest, arguments.threads)
    ids = {file: tokenizer.encode(text)[: arguments.tokens] for file, text in texts.items()}
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    usages = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=sum(map(len, ids.values())))
        for file, name in _names(list(texts)).items():
            bar.update(task, description=name)
            usages.append(
                read_usage(probe, name, ids[file], decoding.context, lambda tokens: bar.advance(task, tokens))
            )
    return probe.jitter, usages


def _names(files: list[str]) -> dict[str, str]:
    """What each file is called in the reports: its own name, or its whole path where another has the same."""
    count = Counter(Path(file).name for file in files)
    return {file: file if count[Path(file).name] > 1 else Path(file).name for file in files}


def _read(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhiMoEError(f"--text {file}: cannot be read ({error})") from None
    if not text:
        raise PhiMoEError(f"--text {file}: is empty; give at least one character")
    return text


if __name__ == "__main__":
    sys.exit(main())
