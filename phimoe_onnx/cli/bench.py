"""phimoe-bench: how fast a bundle prefills and decodes, how near to the memory's limit, and how its peers do on the
same work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from phimoe_onnx.cli._common import DEVICES, Parser, positive, run
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.cli._start import imports
from phimoe_onnx.errors import PhiMoEError

MARK = '{\n  "written_by": "phimoe-bench"'  # how its file begins
HERE = ""  # --peers without a folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = Parser(
        "phimoe-bench",
        "Say how fast a bundle reads a prompt (prefill) and writes (decode), how near the memory's limit that is, and "
        "how its peers do on the same work.",
        "austen-int4",
        "austen-int4 --batch 1 4 --threads 1 --json bench.json",
        "austen-int4 --peers --reference models/phimoe-austen",
        "mini-native mini-stock --peers build/peers --threads 2 --rounds 3",
    )
    add = parser.add_argument
    add(
        "bundle",
        nargs="+",
        metavar="BUNDLE",
        help="a folder that phimoe-export wrote, for text generation; several take turns",
    )
    add("--device", default="cpu", choices=DEVICES, help="where everything runs (default: cpu)")
    add("--threads", type=positive, metavar="N", help="threads for one operator (default: each library's own choice)")
    add(
        "--batch",
        type=positive,
        nargs="+",
        default=[1],
        metavar="B",
        help="prompts at once, one row of the table each (default: 1)",
    )
    add("--prompt", type=positive, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    add("--new-tokens", type=positive, default=64, metavar="N", help="tokens that follow, 2 or more (default: 64)")
    add(
        "--peers",
        nargs="?",
        const=HERE,
        metavar="FOLDER",
        help="also the peers: those that benchmarks/set_up_peers.py set up in FOLDER, each in an environment of its "
        "own (docs/peers.md); without FOLDER, onnxruntime-genai and transformers 5, "
        "over --reference, as far as this environment has them (default: none)",
    )
    add(
        "--rounds",
        type=positive,
        metavar="N",
        help="how often everything runs, in turns; the table has the medians, with the least and the greatest in "
        "brackets (default: 3 with --peers FOLDER, else 1)",
    )
    add("--reference", metavar="CHECKPOINT", help="the folder of the checkpoint, for transformers (default: none)")
    add(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="what the device reads a second (default: measured, on the CPU before and after each round over the first "
        "bundle's mapped weights; on CUDA this takes PyTorch)",
    )
    add("--json", metavar="FILE", help="write everything as JSON, each round too (default: none)")
    add("--overwrite", action="store_true", help="write this file over another; over an earlier one it always is")
    return run(_bench, parser, argv)


def _bench(arguments: argparse.Namespace) -> None:
    with imports():
        from phimoe_onnx.bench.compare import Row, bandwidth, candidates, compare, judge
        from phimoe_onnx.bench.peer import Work
        from phimoe_onnx.bundle import read_manifest

    if arguments.new_tokens < 2:
        raise PhiMoEError("--new-tokens must be 2 or more, for the first is the prompt's")
    folder = None if arguments.peers in (None, HERE) else arguments.peers
    if folder and arguments.device != "cpu":
        raise PhiMoEError("--peers FOLDER runs on the CPU alone; give --peers without a folder")
    if arguments.json:
        check_file(arguments.json, MARK, arguments.overwrite)
    chosen = candidates(arguments.bundle, arguments.reference, arguments.peers is not None, arguments.device, folder)
    first = Path(arguments.bundle[0])
    vocabulary = read_manifest(first).decoding.vocab_size
    rounds = arguments.rounds or (3 if folder else 1)
    given = arguments.bandwidth * 1e9 if arguments.bandwidth else None
    rows: list[Row] = []
    readings: list[float | None] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("running", total=len(arguments.batch) * rounds * len(chosen))
        for batch in arguments.batch:
            work = Work(batch, arguments.prompt, arguments.new_tokens, arguments.device, arguments.threads, vocabulary)
            found: dict[str, Row] = {}
            readings.append(given or bandwidth(arguments.device, arguments.threads, first))
            for _ in range(rounds):
                for _ in compare(chosen, work, found):
                    bar.advance(task)
                readings.append(given or bandwidth(arguments.device, arguments.threads, first))
            known = [reading for reading in readings if reading]
            judge(chosen, work, found, median(known) if known else None)
            rows += found.values()
    title = _title(arguments, rounds, known)
    versions = sorted({row.speed.versions for row in rows if row.speed})
    console = Console(width=140)
    console.print(f"{title}\n{'; '.join(versions)}", soft_wrap=True, markup=False)
    console.print(_table(rows), soft_wrap=True, markup=False)
    if arguments.json:
        result: dict[str, Any] = {"written_by": "phimoe-bench", "title": title, "versions": versions}
        result |= {"bandwidth": median(known) if known else None, "readings": readings}
        result["rows"] = [row.as_dict() for row in rows]
        write_file(arguments.json, json.dumps(result, indent=2) + "\n", MARK, arguments.overwrite)
    ours = {candidate.name for candidate in chosen if candidate.function == "ours"}
    if problems := [row.problem for row in rows if row.candidate in ours and row.problem]:
        raise PhiMoEError(problems[0])  # a peer may fail, the bundle itself may not


def _title(arguments: argparse.Namespace, rounds: int, readings: Sequence[float]) -> str:
    """The conditions, in a line."""
    from phimoe_onnx.bench.compare import processor

    reads = "bandwidth unknown, give --bandwidth"
    if readings:
        least, most = (f"{function(readings) / 1e9:.1f}" for function in (min, max))
        reads = f"reads {least} GB/s" if least == most else f"reads {least} to {most} GB/s"
    threads = f"{arguments.threads} threads" if arguments.threads else "default threads"
    title = f"{datetime.date.today().isoformat()}, {processor() or platform.machine()}, {arguments.device}, {threads}, "
    return f"{title}{reads}; prompts of {arguments.prompt}, {arguments.new_tokens} new, rounds: {rounds}"


def _table(rows: Sequence[Any]) -> str:
    """The rows as a Markdown table."""
    columns = (
        "candidate",
        "batch",
        "load, s",
        "prefill, tokens/s",
        "decode, tokens/s",
        "of the limit",
        "cache",
        "peak memory, GB",
        "of it no file's, GB",
        "same tokens",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        if (speed := row.speed) is None:
            cells = [row.candidate, str(row.batch), row.problem.replace("|", "/")] + [""] * (len(columns) - 3)
        else:
            name = f"{row.candidate} (then: {row.problem.replace('|', '/')})" if row.problem else row.candidate
            share = "" if row.share is None else f"{row.share:.0%}"
            speeds = (_spread(row, "load", ".1f"), _spread(row, "prefill", ".0f"), _spread(row, "decode", ".1f"))
            same = "" if row.same is None else f"{row.same:.0%}"
            sizes = ("" if size is None else f"{size / 1e9:.2f}" for size in (speed.memory, speed.anonymous))
            cells = [name, str(row.batch), *speeds, share, speed.cache, *sizes, same]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(row: Any, name: str, form: str) -> str:
    """A median and, where there are several rounds, the least and the greatest."""
    middle = format(getattr(row.speed, name), form)
    least, greatest = (format(value, form) for value in row.spread(name))
    return middle if len(row.rounds) == 1 else f"{middle} ({least} to {greatest})"


if __name__ == "__main__":
    sys.exit(main())
