"""Runs candidates in turns, each in a process of its own, and holds their speed against the memory's limit."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from phimoe_onnx.bench import peer
from phimoe_onnx.bench.peer import Speed, Work
from phimoe_onnx.bench.traffic import read_bandwidth, step_bytes
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.errors import BundleError, PhiMoEError

OURS = "ours"  # the function of candidates.py; the others are peer.py's
EXPERTS = ("grouped_mm", "batched_mm", "eager")  # transformers' ways to run experts; which is best depends on the batch


@dataclass(frozen=True)
class Candidate:
    """A function of candidates.py or peer.py with its options.

    `python` is the interpreter that has the peer. `weights` is the bundle whose tokens it should give, if there is one.
    `problem` says why it cannot run here, if that is known.
    """

    name: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    python: str = sys.executable
    weights: str = ""


@dataclass
class Row:
    """What was measured of a candidate, round by round; `problem` says why it did not run, or not in every round.

    `share` is the part of the time of a decode step that reading its bytes would take at the device's full speed, for
    this runtime's own rows. `same` is the part of the new tokens, up to the first that differs, that are this
    runtime's.
    """

    candidate: str
    batch: int
    problem: str = ""
    rounds: list[Speed] = field(default_factory=list)
    share: float | None = None
    same: float | None = None

    @property
    def speed(self) -> Speed | None:
        """The medians of the rounds, None where there is none; tokens, cache and versions are the first round's."""
        if not self.rounds:
            return None
        names = ("load", "prefill", "decode", "memory", "anonymous")
        known = {name: [value for each in self.rounds if (value := getattr(each, name)) is not None] for name in names}
        middle: dict[str, Any] = {
            name: type(values[0])(median(values)) if values else None for name, values in known.items()
        }
        return dataclasses.replace(self.rounds[0], **middle)

    def spread(self, name: str) -> tuple[float, float]:
        """The least and the greatest of a field of Speed."""
        values = [getattr(each, name) for each in self.rounds]
        return min(values), max(values)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `speed` holds the medians."""
        speed = self.speed
        return dataclasses.asdict(self) | {"speed": None if speed is None else dataclasses.asdict(speed)}


def candidates(
    bundles: Sequence[str], reference: str | None, peers: bool, device: str, folder: str | None = None
) -> list[Candidate]:
    """This runtime first, on CUDA with and without its CUDA graphs, then the peers, if they are wanted: those of
    `folder`, or, without one, of this environment. A peer that is not installed, or lacks its checkpoint, has that as
    its problem.

    Raises:
        BundleError: there is no bundle, or it is not for text generation.
        PhiMoEError: `folder` is none of set_up_peers.py, a bundle is given twice, or the bundles differ in the size of
            their vocabulary.
    """
    chosen = []
    names = _names(bundles)
    for bundle in bundles:
        task = read_manifest(Path(bundle)).task
        if task != "text-generation":
            raise BundleError(f"{bundle}: is for {task}; phimoe-bench times text generation")
        name = "phimoe-onnx" if len(bundles) == 1 else f"phimoe-onnx, {names[bundle]}"
        chosen.append(Candidate(name, OURS, {"bundle": bundle}, weights=bundle))
        if device == "cuda":
            graphs = {"bundle": bundle, "cuda_graphs": True}
            chosen.append(Candidate(f"{name}, CUDA graphs", OURS, graphs, weights=bundle))
    sizes = {bundle: read_manifest(Path(bundle)).decoding.vocab_size for bundle in bundles}
    if len(set(sizes.values())) > 1:
        raise PhiMoEError(f"bundles of different vocabularies cannot do the same work: {sizes}")
    if folder is not None:
        return chosen + [over_bundle(each, bundles) for each in read_peers(Path(folder))]
    return chosen + (list(_installed(bundles, reference)) if peers else [])


def _names(bundles: Sequence[str]) -> dict[str, str]:
    """The folders' names, or, where two have the same, the paths as they were given."""
    places = {bundle: Path(bundle).resolve() for bundle in bundles}
    if len(set(places.values())) < len(bundles):
        raise PhiMoEError(f"a bundle is given twice: {', '.join(bundles)}; give each once, and --rounds for more turns")
    if len({place.name for place in places.values()}) < len(bundles):
        return {bundle: bundle for bundle in bundles}
    return {bundle: place.name for bundle, place in places.items()}


def read_peers(folder: Path) -> list[Candidate]:
    """The peers that benchmarks/set_up_peers.py set up in a folder, from its NAME.json files.

    Raises:
        PhiMoEError: there are none, or one is damaged.
    """
    again = f"python -m benchmarks.set_up_peers {folder}"
    found: list[Candidate] = []
    for file in sorted(folder.glob("*.json")):
        try:
            found += msgspec.json.decode(file.read_bytes(), type=list[Candidate])
        except OSError as error:
            raise PhiMoEError(f"{file}: cannot be read ({error.strerror})") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PhiMoEError(f"{file}: is no list of peers ({error}); {again} writes it again") from None
    if not found:
        raise PhiMoEError(f"{folder}: has no peers; {again} sets them up")
    return found


def over_bundle(peer: Candidate, bundles: Sequence[str]) -> Candidate:
    """A peer, and, if it is onnxruntime-genai, with the first bundle that it can read."""
    if peer.function != "genai" or peer.problem:
        return peer
    readable = [bundle for bundle in bundles if (Path(bundle) / "genai_config.json").exists()]
    if not readable:
        return dataclasses.replace(peer, problem="reads bundles of --operators stock alone; give one, too")
    return dataclasses.replace(peer, options={"bundle": readable[0]}, weights=readable[0])


def _installed(bundles: Sequence[str], reference: str | None) -> Iterator[Candidate]:
    """The peers of this environment."""
    yield over_bundle(Candidate("onnxruntime-genai", "genai", problem=_missing("onnxruntime-genai")), bundles)
    problem = _missing("transformers", "torch")
    if not problem and reference is None:
        problem = "needs --reference, the checkpoint's folder"
    if problem:
        yield Candidate("transformers", "transformers", {}, problem)
        return
    for experts in EXPERTS:
        options = {"checkpoint": reference, "attention": "sdpa", "experts": experts}
        yield Candidate(f"transformers, sdpa, {experts}", "transformers", options, weights=bundles[0])


def _missing(*packages: str) -> str:
    """That one of these is not installed, in words; nothing if they are."""
    for package in packages:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            return f"not installed (pip install {package})"
    return ""


def take_turn(candidate: Candidate, work: Work, rows: dict[str, Row]) -> Row:
    """Runs a candidate once; one that failed is not tried again.

    Args:
        candidate: whom to run.
        work: what to do.
        rows: by the candidate's name, to which the result is added once it is there.

    Returns:
        The candidate's row.
    """
    row = rows.get(candidate.name) or Row(candidate.name, work.batch, candidate.problem)
    if not row.problem:
        found = _measure(candidate, work)
        if isinstance(found, str):
            row.problem = found
        else:
            row.rounds.append(found)
    rows[candidate.name] = row
    return row


def judge(chosen: Sequence[Candidate], work: Work, rows: dict[str, Row], bandwidth: float | None) -> None:
    """Fills in `share` and `same` of the rows that are there, from the rounds so far."""
    expected: dict[str, list[list[int]]] = {}
    for candidate in chosen:
        row = rows.get(candidate.name)
        if row is None or (speed := row.speed) is None:
            continue
        if candidate.weights in expected:
            row.same = min(_same(expected[candidate.weights], each.token_ids) for each in row.rounds)
        if candidate.function == OURS:
            expected.setdefault(candidate.weights, speed.token_ids)
            if bandwidth:
                bundle = Path(candidate.weights)
                length = work.prompt + work.new_tokens // 2  # the mean of the steps
                limit = bandwidth / step_bytes(bundle, read_manifest(bundle), work.batch, length)
                row.share = speed.decode / work.batch / limit


def bandwidth(device: str, threads: int | None, bundle: Path) -> float | None:
    """Bytes a second that the device reads, measured: on the CPU of the bundle's largest file, mapped; None on CUDA
    without PyTorch.
    """
    if device == "cpu":
        return read_bandwidth(threads, max(bundle.glob("*.data"), key=lambda file: file.stat().st_size, default=None))
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


def processor() -> str:
    """Its name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _measure(candidate: Candidate, work: Work) -> Speed | str:
    """What the candidate's process found, or why it did not."""
    options = json.dumps(candidate.options | {"work": dataclasses.asdict(work)})
    command = [candidate.python, "-P", peer.__file__, candidate.function, options]
    if candidate.function == OURS:
        command = [candidate.python, "-m", "phimoe_onnx.bench.candidates", options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"{candidate.python}: cannot be run ({error.strerror})"
    lines = done.stderr.strip().splitlines()
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}{''.join(f'; {line}' for line in lines[-1:])}"
    if done.returncode:
        return (lines or [f"ended with {done.returncode}"])[-1]
    try:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=Speed)
    except (IndexError, msgspec.DecodeError) as error:
        return f"gave no measurement ({error})"


def _same(expected: list[list[int]], found: list[list[int]]) -> float:
    equal = 0
    for ours, theirs in zip(expected, found, strict=True):
        equal += next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return equal / sum(map(len, expected))
