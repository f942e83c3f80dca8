"""Starts the worker's processes, and goes on behind a mutant that ends one."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

SILENCE = 300.0  # seconds without a word from a process, whose mutants end it after far fewer of the processor


def run(campaign: str, count: int, seed: str = "0") -> list[dict[str, Any]]:
    """What became of each of `count` mutants: `number`, `said`, and a `depth` or a `fault`."""
    results: list[dict[str, Any]] = []
    while len(results) < count:
        results += _batch(campaign, seed, range(len(results), count))
    return results


def _batch(campaign: str, seed: str, numbers: range) -> Iterator[dict[str, Any]]:
    """The results of a process, to its end; a mutant that ended it is the last."""
    command = [sys.executable, "-m", "tests.mutants.worker", campaign, seed, *map(str, numbers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        started, lines = None, _lines(process.stdout)
        try:
            while line := lines.get(timeout=SILENCE):
                result = json.loads(line)
                started = None if "said" in result else result["number"]
                if "said" in result:
                    yield result
            code = process.wait()
        except queue.Empty:
            process.kill()
            code = "silence"
    if started is not None:
        yield {"number": started, "said": "?", "fault": f"ended its process ({code})"}
    elif code:
        raise RuntimeError(f"the campaign {campaign} does not start ({code})")


def _lines(file: IO[str]) -> queue.Queue[str]:
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in file:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def faults(results: list[dict[str, Any]], campaign: str, seed: str) -> str:
    """The faults, each with the command that makes its mutant again."""
    return "\n".join(
        f"{result['said']}\n  {result['fault']}\n  python -m tests.mutants.worker {campaign} {seed} {result['number']}"
        for result in results
        if "fault" in result
    )
