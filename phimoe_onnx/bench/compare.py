"""Runs candidates one after another, each in a process of its own, and holds their speed against the memory's limit."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimoe_onnx.bench.candidates import Speed, Work
from phimoe_onnx.bench.traffic import read_bandwidth, step_bytes
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.errors import BundleError

OURS = "ours"  # the function of candidates.py
EXPERTS = ("grouped_mm", "batched_mm", "eager")  # transformers' ways to run experts; which is best depends on the batch


@dataclass(frozen=True)
class Candidate:
    """A function of candidates.py with its options; `problem` says why it cannot run here, if that is known."""

    name: str
    function: str
    options: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Measured:
    """A candidate's row; `speed` is None where it did not run, and `problem` says why.

    `share` is the part of the time of a decode step that reading its bytes would take at the device's full speed, for
    this runtime's own rows. `same` is the part of the new tokens, up to the first that differs, that are this
    runtime's.
    """

    candidate: str
    batch: int
    speed: Speed | None
    problem: str = ""
    share: float | None = None
    same: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def candidates(bundle: str, reference: str | None, peers: bool, device: str) -> list[Candidate]:
    """This runtime first, on CUDA with and without its CUDA graphs, then the peers, if they are wanted; those that are
    not installed, or lack their checkpoint, with that as their problem.

    Raises:
        BundleError: there is no bundle, or it is not for text generation.
    """
    task = read_manifest(Path(bundle)).task
    if task != "text-generation":
        raise BundleError(f"{bundle}: is for {task}; phimoe-bench times text generation")
    chosen = [Candidate("phimoe-onnx", OURS, {"bundle": bundle})]
    if device == "cuda":
        chosen.append(Candidate("phimoe-onnx, CUDA graphs", OURS, {"bundle": bundle, "cuda_graphs": True}))
    if not peers:
        return chosen
    chosen.append(Candidate("onnxruntime-genai", "genai", {"bundle": bundle}, _missing("onnxruntime-genai")))
    problem = _missing("transformers", "torch")
    if not problem and reference is None:
        problem = "needs --reference, the checkpoint's folder"
    if problem:
        return [*chosen, Candidate("transformers", "transformers", {}, problem)]
    for experts in EXPERTS:
        options = {"checkpoint": reference, "attention": "sdpa", "experts": experts}
        chosen.append(Candidate(f"transformers, sdpa, {experts}", "transformers", options))
    return chosen


def _missing(*packages: str) -> str:
    """That one of these is not installed, in words; nothing if they are."""
    for package in packages:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            return f"not installed (pip install {package})"
    return ""


def compare(bundle: Path, work: Work, chosen: Sequence[Candidate], bandwidth: float | None) -> Iterator[Measured]:
    """Yields a row for each candidate; the first one's tokens are what the others' are held against."""
    expected: list[list[int]] | None = None
    for candidate in chosen:
        row = _measure(candidate, work)
        if row.speed and expected is not None:
            row = dataclasses.replace(row, same=_same(expected, row.speed.token_ids))
        if row.speed and candidate.function == OURS:
            expected = expected or row.speed.token_ids
            if bandwidth:
                length = work.prompt + work.new_tokens // 2  # the mean of the steps
                limit = bandwidth / step_bytes(bundle, read_manifest(bundle), work.batch, length)
                row = dataclasses.replace(row, share=row.speed.decode / work.batch / limit)
        yield row


def bandwidth(device: str, threads: int | None) -> float | None:
    """Bytes a second that the device reads, measured; None on CUDA without PyTorch."""
    if device == "cpu":
        return read_bandwidth(threads)
    if importlib.util.find_spec("torch") is None:
        return None
    code = """
import torch
a = torch.ones(1 << 30, device="cuda")
best = 0
for _ in range(5):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(); a.clone(); end.record(); torch.cuda.synchronize()
    best = max(best, 2 * a.nbytes / (start.elapsed_time(end) / 1e3))
print(best)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def _measure(candidate: Candidate, work: Work) -> Measured:
    if candidate.problem:
        return Measured(candidate.name, work.batch, None, candidate.problem)
    options = json.dumps(candidate.options | {"work": dataclasses.asdict(work)})
    command = [sys.executable, "-m", "phimoe_onnx.bench.candidates", candidate.function, options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return Measured(candidate.name, work.batch, None, lines[-1])
    return Measured(candidate.name, work.batch, Speed(**json.loads(done.stdout.splitlines()[-1])))


def _same(expected: list[list[int]], found: list[list[int]]) -> float:
    equal = 0
    for ours, theirs in zip(expected, found, strict=True):
        equal += next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return equal / sum(map(len, expected))
