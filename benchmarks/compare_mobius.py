"""Compares phimoe-onnx with mobius-onnx on the CPU: parity with PyTorch, speed, size and export time, as Markdown tables.

mobius-onnx stays in an environment of its own (`pip install mobius-onnx`); from the repository's root:

    python -m benchmarks.compare_mobius --mobius-python MOBIUS_ENV/bin/python [--write docs/compared-with-mobius.md]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from phimoe_onnx._version import __version__
from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, cache_names
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.parity import reference
from phimoe_onnx.runtime.tokenizer import Tokenizer
from tests.checkpoints import MODEL, longrope, write_checkpoint

FIGURES = "## Figures\n"  # the heading of a document under which --write puts the tables
TEXT = Path(reference.__file__).parent / "persuasion.txt"
PAST = 512  # cached tokens at a decode step, and the tokens of a prefill
CAPACITY = 768  # of the cache
OURS = ("ours fp32", "ours int4")
MOBIUS = ("mobius fp32", "mobius int4", "mobius fp32, default EP")


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the lengths at which its logits are compared."""

    name: str
    checkpoint: Path
    lengths: dict[str, int]


@dataclass
class Candidate:
    """One exported model and what was measured of it; times in seconds."""

    graph: Path
    export: float
    loads: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def megabytes(self) -> float:
        """The size of the model's folder."""
        return sum(file.stat().st_size for file in self.graph.parent.iterdir()) / 1e6


def main() -> None:
    """Exports, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mobius-python", required=True, metavar="PYTHON", help="the Python of an environment with mobius-onnx")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="threads of ONNX Runtime (default: all)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="interleaved rounds of timing (default: 15)")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"also put the tables under {FIGURES.strip()!r} of this file")
    arguments = parser.parse_args()

    parity: list[Sequence[object]] = []
    speed: list[Sequence[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in make_cases(Path(scratch)):
            candidates = export_all(case, Path(scratch), arguments.mobius_python)
            parity += compare(case, candidates)
            measure(read_config(case.checkpoint), candidates, arguments.threads, arguments.rounds)
            speed += [speed_row(case, name, candidate) for name, candidate in candidates.items() if candidate.steps]
    result = "\n".join([
        f"{conditions(arguments.mobius_python)}; {arguments.threads} threads.\n",
        "Parity with PyTorch in float32, of the logits after every token of one forward pass:\n",
        table(["checkpoint", "tokens", "candidate", "mean diff / std", "max diff / std", "cosine", "top-1"], parity),
        f"Speed with {PAST} tokens: a prefill of them, and decode steps after them (medians of {arguments.rounds} interleaved rounds):\n",
        table(["checkpoint", "candidate", "decode, tokens/s", "prefill, tokens/s", "load, s", "size, MB", "export, s"], speed),
    ])  # fmt: skip
    print(result)
    if arguments.write:
        head = arguments.write.read_text(encoding="utf-8").partition(FIGURES)[0]
        arguments.write.write_text(f"{head}{FIGURES}\n{result}", encoding="utf-8")


def make_cases(scratch: Path) -> list[Case]:
    """The small trained model, and random checkpoints: with longrope, with a window, and one of a size that shows speed."""
    context = {"max_position_embeddings": 1024}
    with_longrope = write_checkpoint(scratch / "longrope", rope_scaling=longrope(16, 64), **context)
    with_window = write_checkpoint(scratch / "window", sliding_window=64, **context)
    shape = {"hidden_size": 1024, "intermediate_size": 960, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4}
    larger = write_checkpoint(scratch / "larger", dtype=torch.bfloat16, vocab_size=32064, sliding_window=2047, **shape, **context)
    boundary = read_config(MODEL).longrope.original_max_position_embeddings
    return [
        Case(MODEL.name, MODEL, {"below the rope boundary": boundary - 56, "past it": boundary + 144}),
        Case("random, longrope", with_longrope, {"below the rope boundary": 48, "past it": 200}),
        Case("random, window", with_window, {"inside the window": 48, "past it": 200}),
        Case("random, 265 M parameters", larger, {"inside the window": 48}),
    ]


def export_all(case: Case, scratch: Path, mobius_python: str) -> dict[str, Candidate]:
    """The candidates by name, each from commands that a user would give."""
    out = scratch / f"{case.checkpoint.name}-exports"
    candidates = {}
    for name, quantize in zip(OURS, ("none", "int4"), strict=True):
        code = "import sys; from phimoe_onnx.cli.export import main; sys.exit(main())"
        folder = out / f"ours-{quantize}"
        seconds = run([sys.executable, "-c", code, case.checkpoint, "-o", folder, "--quantize", quantize])
        candidates[name] = Candidate(folder / "model.onnx", seconds)
    for name, provider in zip((MOBIUS[0], MOBIUS[2]), ("cpu", "default"), strict=True):
        folder = out / f"mobius-{provider}"
        command = [mobius_python, "-m", "mobius", "build", "--config", case.checkpoint, folder, "--ep", provider]
        seconds = run([*command, "--dtype", "f32", "--runtime", "ort-genai"])
        candidates[name] = Candidate(folder / "model.onnx", seconds)
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
    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, accuracy_level=4, nodes_to_exclude=routers)
    quantizer.process()
    target.parent.mkdir()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)
    return time.perf_counter() - start


def compare(case: Case, candidates: dict[str, Candidate]) -> list[Sequence[object]]:
    """The rows of the parity table for one checkpoint."""
    config = read_config(case.checkpoint)
    model = reference.load_reference(case.checkpoint)
    longest = max(case.lengths.values())
    if case.checkpoint == MODEL:
        ids = Tokenizer(MODEL).encode(TEXT.read_text(encoding="utf-8"))[:longest]
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
    logits: NDArray[np.float32] = session.run([LOGITS], {name: value for name, value in feed.items() if name in required})[0][0]
    return logits


def differences(expected: NDArray[np.float32], got: NDArray[np.float32]) -> tuple[str, str, str, str]:
    """Mean and largest difference over the standard deviation of the logits, mean cosine, and top-1 agreement."""
    difference = np.abs(got - expected) / expected.std()
    norms = np.linalg.norm(expected, axis=-1) * np.linalg.norm(got, axis=-1)
    cosine = ((expected * got).sum(axis=-1) / norms).mean()
    top = (expected.argmax(axis=-1) == got.argmax(axis=-1)).mean()
    return f"{difference.mean():.1e}", f"{difference.max():.1e}", f"{cosine:.4f}", f"{top:.1%}"


def measure(config: PhiMoEConfig, candidates: dict[str, Candidate], threads: int, rounds: int) -> None:
    """Times the candidates in turns, so that what else the machine does falls on all alike."""
    timed = {name: candidate for name, candidate in candidates.items() if name != MOBIUS[2]}
    for _ in range(3):
        for candidate in timed.values():
            start = time.perf_counter()
            open_session(candidate.graph, threads)
            candidate.loads.append(time.perf_counter() - start)
    bound = [(candidate, Bound(open_session(candidate.graph, threads), config)) for candidate in timed.values()]
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
    """A session bound to one buffer per layer that is past and present at once, as runtimes do it."""

    def __init__(self, session: ort.InferenceSession, config: PhiMoEConfig) -> None:
        self._session = session
        self._keeps = LOGITS_TO_KEEP in {value.name for value in session.get_overridable_initializers()}
        self._vocab_size = config.vocab_size
        self._binding = session.io_binding()
        shape = (1, config.num_key_value_heads, CAPACITY, config.head_dim)
        names = zip(*(cache_names(config.num_hidden_layers, prefix) for prefix in ("past_key_values", "present")), strict=True)
        self._buffers = []
        for past, present in names:
            buffer = np.zeros(shape, np.float32)
            self._buffers.append(buffer)
            self._binding.bind_input(past, "cpu", 0, np.float32, shape, buffer.ctypes.data)
            self._binding.bind_output(present, "cpu", 0, np.float32, shape, buffer.ctypes.data)

    def time(self, new: int, past: int) -> float:
        """The seconds of one run of `new` tokens after `past` ones, with the logits of the last one if the graph can."""
        ids = np.random.default_rng(past).integers(3, 2000, (1, new))
        inputs = {INPUT_IDS: ids, ATTENTION_MASK: np.ones((1, past + new), np.int64)}
        if self._keeps:
            inputs[LOGITS_TO_KEEP] = np.ones(1, np.int64)
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        logits = np.empty((1, 1 if self._keeps else new, self._vocab_size), np.float32)
        self._binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start


def speed_row(case: Case, name: str, candidate: Candidate) -> Sequence[object]:
    """A row of the speed table."""
    decode, prefill = 1 / median(candidate.steps), PAST / median(candidate.prefills)
    row = (f"{decode:.0f}", f"{prefill:.0f}", f"{median(candidate.loads):.2f}", f"{candidate.megabytes:.1f}", f"{candidate.export:.1f}")
    return (case.name, name, *row)


def conditions(mobius_python: str) -> str:
    """The date, the processor and the versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    code = "from importlib.metadata import version as v; print('mobius-onnx', v('mobius-onnx'), 'on transformers', v('transformers'))"
    theirs = subprocess.run([mobius_python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    date = datetime.datetime.now(datetime.UTC).date()
    return f"{date}, {cpu}; phimoe-onnx {__version__}, {theirs}, ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    main()
