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
from typing import Any

from rich.console import Console
from rich.progress import Progress

from phimoe_onnx.cli._common import DEVICES, Parser, positive, run
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.cli._start import imports
from phimoe_onnx.errors import PhiMoEError

MARK = '{\n  "written_by": "phimoe-bench"'  # how its file begins


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = Parser(
        "phimoe-bench",
        "Say how fast a bundle reads a prompt (prefill) and writes (decode), how near the memory's limit that is, and "
        "how its peers do on the same work.",
        "austen-int4",
        "austen-int4 --batch 1 4 --threads 1 --json bench.json",
        "austen-int4 --peers --reference models/phimoe-austen",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote, for text generation")
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
        action="store_true",
        help="also those of onnxruntime-genai, over the bundle, and transformers 5, over --reference, that are "
        "installed; the table says which are not",
    )
    add("--reference", metavar="CHECKPOINT", help="the folder of the checkpoint, for transformers (default: none)")
    add(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="what the device reads a second (default: measured; on CUDA this takes PyTorch)",
    )
    add("--json", metavar="FILE", help="write everything as JSON (default: none)")
    add("--overwrite", action="store_true", help="write this file over another; over an earlier one it always is")
    return run(_bench, parser, argv)


def _bench(arguments: argparse.Namespace) -> None:
    with imports():
        from phimoe_onnx.bench.candidates import Work
        from phimoe_onnx.bench.compare import Measured, bandwidth, candidates, compare

    if arguments.new_tokens < 2:
        raise PhiMoEError("--new-tokens must be 2 or more, for the first is the prompt's")
    if arguments.json:
        check_file(arguments.json, MARK, arguments.overwrite)
    console = Console(width=140)
    works = [
        Work(batch, arguments.prompt, arguments.new_tokens, arguments.device, arguments.threads)
        for batch in arguments.batch
    ]
    limit = arguments.bandwidth * 1e9 if arguments.bandwidth else bandwidth(arguments.device, arguments.threads)
    chosen = candidates(arguments.bundle, arguments.reference, arguments.peers, arguments.device)
    rows: list[Measured] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("running", total=len(works) * len(chosen))
        for work in works:
            for row in compare(Path(arguments.bundle), work, chosen, limit):
                rows.append(row)
                bar.advance(task)
    reads = f"reads {limit / 1e9:.1f} GB/s" if limit else "bandwidth unknown, give --bandwidth"
    today = datetime.date.today().isoformat()
    threads = f"{arguments.threads} threads" if arguments.threads else "default threads"
    title = f"{today}, {platform.machine()}, {arguments.device}, {threads}, {reads}; "
    title += f"prompts of {arguments.prompt}, {arguments.new_tokens} new"
    console.print(title, soft_wrap=True)
    console.print(_table(rows), soft_wrap=True, markup=False)
    if arguments.json:
        result: dict[str, Any] = {"written_by": "phimoe-bench", "title": title, "bandwidth": limit}
        result["rows"] = [row.as_dict() for row in rows]
        write_file(arguments.json, json.dumps(result, indent=2) + "\n", MARK, arguments.overwrite)
    if problems := [row.problem for row in rows if row.candidate == chosen[0].name and row.speed is None]:
        raise PhiMoEError(problems[0])  # a peer may fail, the bundle itself may not


def _table(rows: Sequence[Any]) -> str:
    """The rows as a Markdown table."""
    columns = (
        "candidate",
        "batch",
        "load, s",
        "prefill, tokens/s",
        "decode, tokens/s",
        "of the limit",
        "peak memory, GB",
        "same tokens",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        if row.speed is None:
            cells = [row.candidate, str(row.batch), row.problem] + [""] * (len(columns) - 3)
        else:
            share = "" if row.share is None else f"{row.share:.0%}"
            speeds = (f"{row.speed.load:.1f}", f"{row.speed.prefill:.0f}", f"{row.speed.decode:.1f}")
            same = "" if row.same is None else f"{row.same:.0%}"
            memory = "" if row.speed.memory is None else f"{row.speed.memory / 1e9:.2f}"
            cells = [row.candidate, str(row.batch), *speeds, share, memory, same]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
