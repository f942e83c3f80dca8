"""Compares phimoe-onnx with mobius-onnx on the CPU: parity with PyTorch, speed, size and export time, as Markdown
tables.

mobius-onnx stays in an environment of its own (`pip install mobius-onnx`); from the repository's root:

    python -m benchmarks.compare_mobius --mobius MOBIUS_ENV/bin/mobius [--output TABLES.md]
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from phimoe_onnx import reference
from phimoe_onnx._version import __version__
from phimoe_onnx.bench.compare import processor
from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, cache_names
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.parity.verify import SAMPLE
from phimoe_onnx.text.tokenizer import Tokenizer
from tests.checkpoints import MODEL, longrope, write_checkpoint

PAST = 512  # cached tokens at a decode step, and the tokens of a prefill
CAPACITY = 768  # of the cache
OURS = ("ours fp32", "ours int4")
MOBIUS = ("mobius fp32", "mobius int4", "mobius fp32, default EP")


@dataclass(frozen=True)
class Case:
    """A checkpoint, the lengths at which its logits are compared, and whether it is large enough for its speed to tell
    anything.
    """

    name: str
    checkpoint: Path
    lengths: dict[str, int]
    timed: bool


@dataclass
class Candidate:
    """One exported model and what was measured of it; times in seconds."""

    graph: Path
    export: float
    shares_cache: bool = True  # whether past and present may be one buffer, as GroupQueryAttention takes it
    loads: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def megabytes(self) -> float:
        """The size of the model's folder."""
        return sum(file.stat().st_size for file in self.graph.parent.iterdir()) / 1e6


def main() -> None:
    """Exports, measures and prints."""
    logging.disable(logging.INFO)  # the quantiser's, a line a node
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mobius", type=Path, required=True, metavar="FILE", help="the command of an environment with mobius-onnx"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), metavar="N", help="threads of ONNX Runtime (default: all)"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="interleaved rounds of timing (default: 15)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the tables to this file")
    arguments = parser.parse_args()

    parity: list[Sequence[object]] = []
    speed: list[Sequence[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in make_cases(Path(scratch)):
            candidates = export_all(case, Path(scratch), arguments.mobius)
            parity += compare(case, candidates)
            if case.timed:
                measure(read_config(case.checkpoint), candidates.values(), arguments.threads, arguments.rounds)
                speed += [speed_row(case, name, candidate) for name, candidate in candidates.items()]
    result = "\n".join([
        f"{conditions(arguments.mobius)}; {arguments.threads} threads.\n",
        "Parity with PyTorch in float32, of the logits after every token of one forward pass:\n",
        table(["checkpoint", "tokens", "candidate", "mean diff / std", "max diff / std", "cosine", "top-1"], parity),
        f"Speed with {PAST} tokens: a prefill of them, and decode steps after them (medians of {arguments.rounds} "
        f"interleaved rounds):\n",
        table(
            [
                "checkpoint",
                "candidate",
                "decode, tokens/s",
                "prefill, tokens/s",
                "load, s",
                "size, MB",
                "export, s",
            ],
            speed,
        ),
    ])  # fmt: skip
    print(result)
    if arguments.output:
        arguments.output.write_text(result, encoding="utf-8")


def make_cases(scratch: Path) -> list[Case]:
    """The small trained model, and random checkpoints: with longrope, with a window, and one of a size that shows
    speed.
    """
    context = {"max_position_embeddings": 1024}
    scaling = {"rope_scaling": longrope(16, 64), "original_max_position_embeddings": 64}
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 960,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    with_longrope = write_checkpoint(scratch / "longrope", **scaling, **context)
    with_window = write_checkpoint(scratch / "window", sliding_window=64, **context)
    larger = write_checkpoint(
        scratch / "larger", dtype=torch.bfloat16, vocab_size=32064, sliding_window=2047, **shape, **context
    )
    return [
        Case(MODEL.name, MODEL, {"below the rope boundary": 200, "past it": 400}, timed=True),
        Case("random, longrope", with_longrope, {"below the rope boundary": 48, "past it": 200}, timed=False),
        Case("random, window of 64", with_window, {"inside the window": 48, "past it": 200}, timed=False),
        Case("random, 265 M parameters", larger, {}, timed=True),
    ]


def export_all(case: Case, scratch: Path, mobius: Path) -> dict[str, Candidate]:
    """The candidates by name, each from commands that a user would give."""
    out = scratch / f"{case.checkpoint.name}-exports"
    candidates = {}
    for name, quantize in zip(OURS, ("none", "int4"), strict=True):
        code = "import sys; from phimoe_onnx.cli.export import main; sys.exit(main())"
        folder = out / f"ours-{quantize}"
        options = ["--quantize", quantize, "--operators", "stock"]
        seconds = run([sys.executable, "-c", code, case.checkpoint, "-o", folder, *options])
        candidates[name] = Candidate(folder / "model.onnx", seconds)
    for name, provider in zip((MOBIUS[0], MOBIUS[2]), ("cpu", "default"), strict=True):
        folder = out / f"mobius-{provider}"
        command = [mobius, "build", "--config", case.checkpoint, folder, "--ep", provider]
        seconds = run([*command, "--dtype", "f32", "--runtime", "ort-genai"])
        candidates[name] = Candidate(folder / "model.onnx", seconds, shares_cache=provider == "cpu")
    plain = candidates[MOBIUS[0]]
    target = out / "mobius-int4" / "model.onnx"
    candidates[MOBIUS[1]] = Candidate(target, plain.export + quantize_int4(plain.graph, target))
    return {name: candidates[name] for name in (*OURS, *MOBIUS)}


def run(command: Sequence[str | Path]) -> float:
    """Runs a command quietly; returns its seconds."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def quantize_int4(graph: Path, target: Path) -> float:
    """ONNX Runtime's own int4 quantiser, with the router left in float32 as ours is; returns its seconds."""
    start = time.perf_counter()
    model = onnx.load(graph)
    routers = [node.name for node in model.graph.node if node.op_type == "MatMul" and "mlp.gate." in node.input[1]]
    quantizer = MatMulNBitsQuantizer(
        model, block_size=32, is_symmetric=True, accuracy_level=4, nodes_to_exclude=routers
    )
    quantizer.process()
    target.parent.mkdir()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)
    return time.perf_counter() - start


def compare(case: Case, candidates: dict[str, Candidate]) -> list[Sequence[object]]:
    """The rows of the parity table for one checkpoint."""
    config = read_config(case.checkpoint)
    model = reference.load_reference(case.checkpoint)
    longest = max(case.lengths.values(), default=0)
    if case.checkpoint == MODEL:
        ids = Tokenizer(MODEL, hidden=()).encode(SAMPLE.read_text(encoding="utf-8"))[:longest]
    else:
        ids = np.random.default_rng(0).integers(3, 2000, longest).tolist()
    rows: list[Sequence[object]] = []
    for label, length in case.lengths.items():
        expected = reference.logits(model, ids[:length])
        for name, candidate in candidates.items():
            got = one_pass(candidate.graph, config, ids[:length])
            rows.append((case.name, f"{length}, {label}", name, *differences(expected, got)))
    return rows


def one_pass(graph: Path, config: PhiMoEConfig, ids: Sequence[int]) -> NDArray[np.float32]:
    """The logits after every token, float32 [S, V], from an empty cache and the inputs that the graph requires."""
    session = open_session(graph)
    feed = {INPUT_IDS: np.array([ids], np.int64), ATTENTION_MASK: np.ones((1, len(ids)), np.int64)}
    feed["position_ids"] = np.arange(len(ids))[None]
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    feed |= dict.fromkeys(cache_names(config.num_hidden_layers, "past_key_values"), empty)
    required = {value.name for value in session.get_inputs()}
    logits: NDArray[np.float32] = session.run(
        [LOGITS], {name: value for name, value in feed.items() if name in required}
    )[0][0]
    return logits


def differences(expected: NDArray[np.float32], got: NDArray[np.float32]) -> tuple[str, str, str, str]:
    """Mean and largest difference over the standard deviation of the logits, mean cosine, and top-1 agreement."""
    difference = np.abs(got - expected) / expected.std()
    norms = np.linalg.norm(expected, axis=-1) * np.linalg.norm(got, axis=-1)
    cosine = ((expected * got).sum(axis=-1) / norms).mean()
    top = (expected.argmax(axis=-1) == got.argmax(axis=-1)).mean()
    return f"{difference.mean():.1e}", f"{difference.max():.1e}", f"{cosine:.4f}", f"{top:.1%}"


def measure(config: PhiMoEConfig, candidates: Collection[Candidate], threads: int, rounds: int) -> None:
    """Times the candidates in turns, so that what else the machine does falls on all alike."""
    for _ in range(3):
        for candidate in candidates:
            start = time.perf_counter()
            open_session(candidate.graph, threads)
            candidate.loads.append(time.perf_counter() - start)
    bound = [(candidate, Bound(candidate, config, threads)) for candidate in candidates]
    for number in range(rounds + 1):  # the first round warms up
        for candidate, model in bound:
            prefill = model.time(PAST, 0)
            steps = [model.time(1, PAST + step) for step in range(8)]
            if number:
                candidate.prefills.append(prefill)
                candidate.steps += steps


def open_session(graph: Path, threads: int | None = None) -> ort.InferenceSession:
    """A session on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class Bound:
    """A session with its inputs and outputs bound; where the graph allows it, past and present are one buffer."""

    def __init__(self, candidate: Candidate, config: PhiMoEConfig, threads: int) -> None:
        self._session = open_session(candidate.graph, threads)
        self._shares_cache = candidate.shares_cache
        self._keeps = LOGITS_TO_KEEP in {value.name for value in self._session.get_overridable_initializers()}
        self._takes_positions = "position_ids" in {value.name for value in self._session.get_inputs()}
        self._binding = self._session.io_binding()
        self._past = cache_names(config.num_hidden_layers, "past_key_values")
        self._present = cache_names(config.num_hidden_layers, "present")
        self._shape = (1, config.num_key_value_heads, CAPACITY, config.head_dim)
        self._buffers = [np.zeros(self._shape, np.float32) for _ in self._past]

    def time(self, new: int, past: int) -> float:
        """The seconds of one run of `new` tokens after `past` ones, with the logits of the last one only if the graph
        can.
        """
        inputs = {
            INPUT_IDS: np.random.default_rng(past).integers(3, 2000, (1, new)),
            ATTENTION_MASK: np.ones((1, past + new), np.int64),
        }
        if self._keeps:
            inputs[LOGITS_TO_KEEP] = np.ones(1, np.int64)
        if self._takes_positions:
            inputs["position_ids"] = np.arange(past, past + new)[None]
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        for past_name, present_name, buffer in zip(self._past, self._present, self._buffers, strict=True):
            if self._shares_cache:
                self._binding.bind_input(past_name, "cpu", 0, np.float32, self._shape, buffer.ctypes.data)
                self._binding.bind_output(present_name, "cpu", 0, np.float32, self._shape, buffer.ctypes.data)
            else:
                cached = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(buffer[:, :, :past]))
                self._binding.bind_ortvalue_input(past_name, cached)
                self._binding.bind_output(present_name)
        self._binding.bind_output(LOGITS)
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start


def speed_row(case: Case, name: str, candidate: Candidate) -> Sequence[object]:
    """A row of the speed table."""
    decode, prefill = 1 / median(candidate.steps), PAST / median(candidate.prefills)
    row = (
        f"{decode:.0f}",
        f"{prefill:.0f}",
        f"{median(candidate.loads):.2f}",
        f"{candidate.megabytes:.1f}",
        f"{candidate.export:.1f}",
    )
    return (case.name, name, *row)


def conditions(mobius: Path) -> str:
    """The date, the processor and the versions."""
    code = "from importlib.metadata import version as v; "
    code += "print('mobius-onnx', v('mobius-onnx'), 'on transformers', v('transformers'))"
    theirs = subprocess.run(
        [mobius.with_name("python"), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    date = datetime.datetime.now(datetime.UTC).date()
    ours = f"phimoe-onnx {__version__}, {theirs}, ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}"
    return f"{date}, {processor()}; {ours}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    main()
