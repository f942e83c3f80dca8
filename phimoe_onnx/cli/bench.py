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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from phimoe_onnx.cli._common import DEVICES, Parser, positive, run
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.cli._start import imports
from phimoe_onnx.errors import PhiMoEError

if TYPE_CHECKING:
    from phimoe_onnx.bench.compare import Candidate, Row
    from phimoe_onnx.bench.peer import Work

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
    add(
        "--json",
        metavar="FILE",
        help="write everything as JSON, each round too, anew after every round (default: none)",
    )
    add("--overwrite", action="store_true", help="write this file over another; over an earlier one it always is")
    return run(_bench, parser, argv)


def _bench(arguments: argparse.Namespace) -> None:
    with imports():
        from phimoe_onnx.bench.compare import candidates
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
    vocabulary = read_manifest(Path(arguments.bundle[0])).decoding.vocab_size
    common = (arguments.prompt, arguments.new_tokens, arguments.device, arguments.threads, vocabulary)
    works = [Work(batch, *common) for batch in arguments.batch]
    results = _Results(arguments, chosen, works, arguments.rounds or (3 if folder else 1))
    try:
        results.measure()
    finally:  # also where a run is cut short
        results.show()
        if not results.whole:
            results.save()
    ours = {candidate.name for candidate in chosen if candidate.function == "ours"}
    if problems := [row.problem for row in results.rows() if row.candidate in ours and row.problem]:
        raise PhiMoEError(problems[0])  # a peer may fail, the bundle itself may not


class _Results:
    """What is known so far of all candidates: `whole` when the last round is over."""

    def __init__(
        self, arguments: argparse.Namespace, chosen: Sequence[Candidate], works: Sequence[Work], rounds: int
    ) -> None:
        self.arguments, self.chosen, self.rounds = arguments, chosen, rounds
        self.found: list[tuple[Work, dict[str, Row]]] = [(work, {}) for work in works]
        self.readings: list[float | None] = []
        self.whole = False

    def measure(self) -> None:
        """Runs everything, says on standard error how it goes, and saves after each round."""
        from phimoe_onnx.bench.compare import take_turn

        console = Console(file=sys.stderr, highlight=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=len(self.found) * self.rounds * len(self.chosen))
            for work, rows in self.found:
                self._read_memory(bar, task)
                for number in range(1, self.rounds + 1):
                    for candidate in self.chosen:
                        now = f"batch {work.batch}, round {number} of {self.rounds}: {candidate.name}"
                        bar.update(task, description=now)
                        row = take_turn(candidate, work, rows)
                        console.print(f"{now}: {_outcome(row)}", markup=False, soft_wrap=True)
                        bar.advance(task)
                    self._read_memory(bar, task)
                    self.whole = number == self.rounds and work is self.found[-1][0]
                    self.save()

    def _read_memory(self, bar: Progress, task: TaskID) -> None:
        from phimoe_onnx.bench.compare import bandwidth

        arguments = self.arguments
        bar.update(task, description="the memory's speed")
        given = arguments.bandwidth * 1e9 if arguments.bandwidth else None
        self.readings.append(given or bandwidth(arguments.device, arguments.threads, Path(arguments.bundle[0])))

    def bandwidth(self) -> float | None:
        """The median of what was read, bytes a second."""
        known = [reading for reading in self.readings if reading]
        return median(known) if known else None

    def rows(self) -> list[Row]:
        """All that there are, judged."""
        from phimoe_onnx.bench.compare import judge

        for work, rows in self.found:
            judge(self.chosen, work, rows, self.bandwidth())
        return [row for _, rows in self.found for row in rows.values()]

    def show(self) -> None:
        """Prints the table, if anything was measured."""
        if rows := self.rows():
            console = Console(width=140)
            console.print(f"{self._title()}\n{'; '.join(_versions(rows))}", soft_wrap=True, markup=False)
            console.print(_table(rows), soft_wrap=True, markup=False)

    def save(self) -> None:
        """Writes the file of --json anew; a pipe or a device gets the whole alone."""
        file, rows = self.arguments.json, self.rows()
        if not (file and rows) or (Path(file).exists() and not Path(file).is_file() and not self.whole):
            return
        result: dict[str, Any] = {"written_by": "phimoe-bench", "title": self._title(), "versions": _versions(rows)}
        result |= {"cut_short": not self.whole, "bandwidth": self.bandwidth(), "readings": self.readings}
        result["rows"] = [row.as_dict() for row in rows]
        write_file(file, json.dumps(result, indent=2) + "\n", MARK, self.arguments.overwrite)

    def _title(self) -> str:
        """The conditions, in a line."""
        from phimoe_onnx.bench.compare import processor

        arguments = self.arguments
        reads = "bandwidth unknown, give --bandwidth"
        if known := [reading for reading in self.readings if reading]:
            least, most = (f"{function(known) / 1e9:.1f}" for function in (min, max))
            reads = f"reads {least} GB/s" if least == most else f"reads {least} to {most} GB/s"
        threads = f"{arguments.threads} threads" if arguments.threads else "default threads"
        where = f"{processor() or platform.machine()}, {arguments.device}, {threads}, {reads}"
        rounds = f"rounds: {self.rounds}{'' if self.whole else ', cut short'}"
        work = f"prompts of {arguments.prompt}, {arguments.new_tokens} new, {rounds}"
        return f"{datetime.date.today().isoformat()}, {where}; {work}"


def _outcome(row: Row) -> str:
    """What a candidate's last round gave, or why there was none."""
    if row.problem:
        return row.problem
    last = row.rounds[-1]
    return f"prefill {last.prefill:.0f}, decode {last.decode:.1f} tokens/s"


def _versions(rows: Sequence[Row]) -> list[str]:
    return sorted({row.speed.versions for row in rows if row.speed})


def _table(rows: Sequence[Row]) -> str:
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


def _spread(row: Row, name: str, form: str) -> str:
    """A median and, where there are several rounds, the least and the greatest."""
    middle = format(getattr(row.speed, name), form)
    least, greatest = (format(value, form) for value in row.spread(name))
    return middle if len(row.rounds) == 1 else f"{middle} ({least} to {greatest})"


if __name__ == "__main__":
    sys.exit(main())
