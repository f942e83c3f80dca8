"""phimoe-bench: how fast a bundle prefills and decodes, how near to the memory's limit, and how its peers do on the
same work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from phimoe_onnx.cli._common import run
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.errors import PhiMoEError

MARK = '{\n  "written_by": "phimoe-bench"'  # how its file begins


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = argparse.ArgumentParser(prog="phimoe-bench", description=__doc__)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote, for text generation")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where everything runs (default: cpu)")
    add("--threads", type=int, metavar="N", help="threads for one operator (default: each library's own choice)")
    add(
        "--batch",
        type=int,
        nargs="+",
        default=[1],
        metavar="B",
        help="prompts at once, one row of the table each (default: 1)",
    )
    add("--prompt", type=int, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    add("--new-tokens", type=int, default=64, metavar="N", help="tokens that follow (default: 64)")
    add(
        "--peers",
        action="store_true",
        help="also onnxruntime-genai over the bundle, and transformers over --reference, if installed",
    )
    add("--reference", metavar="CHECKPOINT", help="the folder of the checkpoint, for transformers")
    add(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="what the device reads a second (default: measured; on CUDA this takes PyTorch)",
    )
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--overwrite", action="store_true", help="write this file over another; over an earlier one it always is")
    return run(_bench, parser, argv)


def _bench(arguments: argparse.Namespace) -> None:
    from phimoe_onnx.bench.candidates import Work
    from phimoe_onnx.bench.compare import Measured, bandwidth, candidates, compare

    if min(*arguments.batch, arguments.prompt, arguments.new_tokens - 1) < 1:
        raise PhiMoEError("--batch and --prompt must be 1 or more, --new-tokens 2 or more")
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
            cells = [row.candidate, str(row.batch), *speeds, share, f"{row.speed.memory / 1e9:.2f}", same]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
