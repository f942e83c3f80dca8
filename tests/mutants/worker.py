"""Runs mutants in a process of their own, within bounds, and says of each how deep it got or what is wrong.

A mutant that takes too much of the processor or of memory, or that crashes, ends the process: whoever started it sees
which one that was, and goes on behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from tests.mutants.mutator import Mutator

SECONDS = 60.0  # of the processor, for one mutant
MEMORY = 1 << 30  # of address space, beyond what is there before the first
RESIDENT = 300 << 10  # KiB that one mutant may add to the process's peak
# what libraries print and nobody can keep them from: a panic of tokenizers', an overflow in ONNX Runtime's allocator
KNOWN = re.compile(r"\s*thread '|.*onnxruntime:Default, allocator\.cc", re.DOTALL)
CAMPAIGNS = {
    "export": "tests.mutants.exports:Exports",
    "load": "tests.mutants.loads:Loads",
    "options": "tests.mutants.options:Calls",
    "transformers": "tests.oracle.mutants:Oracle",
}


def main(campaign: str, seed: str, numbers: list[int]) -> None:
    """Runs some mutants of a campaign; prints a line of JSON for each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is none of it
    root = Path(tempfile.mkdtemp(prefix="mutants-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    noise = (root / "stderr").open("w+b")
    try:
        module, _, name = CAMPAIGNS[campaign].partition(":")
        runner = getattr(importlib.import_module(module), name)(root)
        limit_memory()
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        for number in numbers:
            mutator = Mutator(f"{campaign} {seed} {number}")
            print(json.dumps({"number": number}), file=out, flush=True)
            result = run(runner, mutator, root / "mutant", None if campaign == "transformers" else noise)
            print(json.dumps({"number": number, "said": " ".join(mutator.said)[:1000], **result}), file=out, flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run(runner, mutator: Mutator, folder: Path, noise) -> dict[str, str]:
    """Runs one mutant; its depth, or its fault."""
    folder.mkdir()
    start = os.fstat(noise.fileno()).st_size if noise else 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            depth, error = runner.run(mutator, folder)
            result = {"depth": depth, "error": "" if error is None else str(error)[:300]}
        if caught:
            result["fault"] = f"warns: {caught[0].category.__name__}: {caught[0].message}"[:500]
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
        result = {"fault": f"{type(error).__name__}: {str(error)[:600]} ({where})"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > RESIDENT:
        result.setdefault("fault", f"took {grown >> 10} MiB")
    if noise and os.fstat(noise.fileno()).st_size > start:
        noise.seek(start)
        printed = noise.read().decode(errors="replace")
        if not KNOWN.match(printed):
            result.setdefault("fault", f"prints: {printed[:500]}")
    return result


def limit_memory() -> None:
    """Bounds the address space; elsewhere than on Linux nothing says how much of it is there already."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(number) for number in sys.argv[3:]])
