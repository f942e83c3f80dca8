"""Compares phimoe-onnx with OpenVINO on the CPU, as Markdown tables: exactness, export time and memory, and speed.

OpenVINO comes through optimum-intel and gets an environment of its own, which the first run makes (some 6 GB). From the
repository's root:

    python -m benchmarks.compare_openvino [--layers 8] [--rounds 3] [--threads 2] [--output TABLES.md]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from benchmarks.compare_mobius import differences, table
from benchmarks.process import measure
from benchmarks.shapes import write_checkpoint as write_shape
from phimoe_onnx import reference
from phimoe_onnx._version import __version__
from phimoe_onnx.bench import peer
from phimoe_onnx.bench.compare import processor
from phimoe_onnx.bench.peer import Work
from phimoe_onnx.bench.traffic import read_bandwidth
from phimoe_onnx.config import read_config
from phimoe_onnx.modeling import PhiMoEForCausalLM
from phimoe_onnx.parity.verify import SAMPLE
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.text.tokenizer import Tokenizer
from tests.checkpoints import MODEL, longrope, write_checkpoint

Answers = dict[str, NDArray[Any]]  # of openvino_peer.py
PACKAGES = ("optimum-intel==2.2.*", "openvino==2026.4.*", "openvino-genai==2026.4.*", "nncf")
PEER = Path(__file__).with_name("openvino_peer.py")
EDGE = 256  # tokens, the small model's rope boundary
NEW = 100  # tokens of the greedy continuations
PROMPTS = {"ends below the edge": EDGE - NEW - 28, "crosses it": EDGE - NEW // 2, "begins beyond it": EDGE + 64}
PROMPT = 512  # tokens, where speed is measured
HEADING = (
    "Against PyTorch in float32: the logits after every token of a prompt in one pass, and how many of the greedy "
    "tokens that follow are PyTorch's, up to the first that is not. The edge is the rope boundary or the window:"
)
# OpenVINO's own precisions are bfloat16 where the processor has it, and integers for the cache
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
HINTS: dict[str, dict[str, str]] = {"OpenVINO, float32": FLOAT32, "OpenVINO as it comes": {}}
# --weight-format int4 alone takes groups of 128, which do not divide the family's narrower experts
INT4 = {
    "phimoe-onnx, int4": ["--quantize", "int4", "--operators", "stock"],
    "OpenVINO, int4": ["--weight-format", "int4", "--group-size", "64"],
}


def main() -> None:
    """Sets up, exports, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--environment", type=Path, default=Path("build/openvino"), metavar="DIR", help="default: build/openvino")
    add("--layers", type=int, default=8, metavar="N", help="layers of Phi-mini-MoE's shape to time; 0 times nothing")
    add("--rounds", type=int, default=3, metavar="N", help="rounds of timing, in turns (default: 3)")
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="threads of either (default: all)")
    add("--output", type=Path, metavar="FILE", help="also write the tables to this file")
    arguments = parser.parse_args()

    python = set_up(arguments.environment)
    parts = [conditions(python, arguments.threads)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [row for case in checkpoints(folder) for row in compare(*case, folder, python)]
        columns = ["checkpoint", "tokens", "candidate", "mean diff / std", "max diff / std", "cosine", "top-1"]
        parts += [f"{HEADING}\n", table([*columns, "same tokens"], rows)]
        if arguments.layers:
            parts += time_all(folder, python, arguments.layers, arguments.rounds, arguments.threads)
    result = "\n".join(parts)
    print(result)
    if arguments.output:
        arguments.output.write_text(result, encoding="utf-8")


def set_up(folder: Path) -> Path:
    """Makes OpenVINO's environment where there is none; returns its Python."""
    python = folder.absolute() / "bin" / "python"
    if not (folder / "bin" / "optimum-cli").exists():
        print(f"installing {', '.join(PACKAGES)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def checkpoints(scratch: Path) -> Iterator[tuple[str, Path]]:
    """A name and a checkpoint, each of which changes at EDGE tokens: the rope boundary, or the sliding window."""
    context = {"max_position_embeddings": 1024}
    scaling = {"rope_scaling": longrope(16, EDGE), "original_max_position_embeddings": EDGE}
    yield MODEL.name, MODEL
    yield "random, longrope", write_checkpoint(scratch / "longrope", **scaling, **context)
    yield "random, window", write_checkpoint(scratch / "window", sliding_window=EDGE, **context)


def compare(name: str, checkpoint: Path, scratch: Path, python: Path) -> Iterator[Sequence[object]]:
    """The rows of the table of exactness for one checkpoint: with each prompt the logits in one pass, and the tokens
    that are generated after it.
    """
    model = reference.load_reference(checkpoint)
    assert isinstance(model, PhiMoEForCausalLM)
    ids = Tokenizer(MODEL, hidden=()).encode(SAMPLE.read_text(encoding="utf-8"))
    prompts = {label: ids[:length] for label, length in PROMPTS.items()}
    answers = ours(checkpoint, scratch / f"{checkpoint.name}-ours", prompts)
    answers |= openvino(checkpoint, scratch / f"{checkpoint.name}-openvino", prompts, python)
    for label, prompt in prompts.items():
        expected = reference.logits(model, prompt)
        tokens = reference.greedy(model, prompt, NEW)
        ends = (n + 1 for n, token in enumerate(tokens) if token in model.config.eos_token_id)
        count = next(ends, NEW)  # PhiMoE.generate ends there
        for candidate, answer in answers.items():
            found = answer[f"{label} tokens"].tolist()
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens[:count], found, strict=False)))
            cells = differences(expected, answer[f"{label} logits"])
            yield name, f"{len(prompt)} + {count}, {label}", candidate, *cells, f"{same} of {count}"


def ours(checkpoint: Path, output: Path, prompts: dict[str, list[int]]) -> dict[str, Answers]:
    """This project's answers, in openvino_peer.py's form."""
    measure(export_command("phimoe-onnx", checkpoint, output, ["--quantize", "none"]))
    model = PhiMoE.load(output)
    answers: Answers = {}
    for label, prompt in prompts.items():
        answers[f"{label} logits"] = model.logits(prompt)
        answers[f"{label} tokens"] = np.array(model.generate(prompt, max_new_tokens=NEW).token_ids)
    return {"phimoe-onnx, float32": answers}


def openvino(checkpoint: Path, output: Path, prompts: dict[str, list[int]], python: Path) -> dict[str, Answers]:
    """OpenVINO's answers in each of the precisions."""
    measure(export_command("OpenVINO", checkpoint, output, ["--weight-format", "fp32"], python))
    with_ids = output / "prompts.npz"
    np.savez(with_ids, **{label: np.array(prompt) for label, prompt in prompts.items()})
    found: dict[str, Answers] = {}
    for name, hints in HINTS.items():
        answers = output / "answers.npz"
        options = {"export": output, "prompts": with_ids, "new": NEW, "hints": hints, "answers": answers}
        measure([str(python), str(PEER), json.dumps(options, default=str)])
        found[name] = dict(np.load(answers))
    return found


def time_all(scratch: Path, python: Path, layers: int, rounds: int, threads: int) -> Iterator[str]:
    """The tables of exports and speeds on random layers of Phi-mini-MoE's shape."""
    checkpoint = scratch / "phi-mini"
    parameters = write_shape(checkpoint, "Phi-mini-MoE", layers, layers)
    work = Work(1, PROMPT, 32, "cpu", threads, read_config(checkpoint).vocab_size)
    exports, timings = [], {}
    for name, options in INT4.items():
        output = scratch / f"phi-mini-{name.partition(',')[0]}"
        seconds, peak, _ = measure(export_command(name, checkpoint, output, options, python))
        size = sum(file.stat().st_size for file in output.iterdir())
        exports.append((name, f"{seconds:.0f}", f"{peak / 2**30:.2f}", f"{size / 1e9:.2f}"))
        timings[name] = speed_command(name, output, work, python)
    yield f"Exports of {layers} layers of Phi-mini-MoE's shape, {parameters / 1e9:.2f} B random parameters in bf16:\n"
    yield table(["candidate", "export, s", "peak memory, GiB", "size, GB"], exports)

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in timings}
    for _ in range(rounds):
        for name, command in timings.items():
            runs[name].append(json.loads(measure(command)[2].splitlines()[-1]))
    yield f"Speed of the same, in turns, medians of {rounds} rounds; peak memory is a process's own:\n"
    columns = ("load, s", "decode, tokens/s", f"prefill {PROMPT}, tokens/s", "peak memory, GB")
    yield table(["candidate", *columns], [(name, *speed_cells(results)) for name, results in runs.items()])


def speed_cells(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The medians of a candidate's rounds."""
    for field, form, unit in (("load", ".1f", 1), ("decode", ".1f", 1), ("prefill", ".0f", 1), ("memory", ".2f", 1e9)):
        yield format(median(result[field] for result in results) / unit, form)


def export_command(
    name: str, checkpoint: Path, output: Path, options: Sequence[str], python: Path = Path(sys.executable)
) -> list[str]:
    """What a user would type, by the candidate's name; `python` is OpenVINO's."""
    if name.startswith("OpenVINO"):
        command = [str(python.with_name("optimum-cli")), "export", "openvino", "--model", str(checkpoint)]
        return [*command, "--task", "text-generation-with-past", *options, str(output)]
    code = "import sys; from phimoe_onnx.cli.export import main; sys.exit(main())"
    return [sys.executable, "-c", code, str(checkpoint), "--output", str(output), *options]


def speed_command(name: str, export: Path, work: Work, python: Path) -> list[str]:
    """One candidate on the work, in a process of its own that prints a line of JSON."""
    if name.startswith("OpenVINO"):
        options = {"export": str(export), "work": dataclasses.asdict(work)}
        return [str(python), "-P", peer.__file__, "openvino", json.dumps(options)]
    options = {"bundle": str(export), "work": dataclasses.asdict(work)}
    return [sys.executable, "-m", "phimoe_onnx.bench.candidates", json.dumps(options)]


def conditions(python: Path, threads: int) -> str:
    """The date, the processor and how fast it reads, and the versions."""
    names = "'optimum-intel', 'openvino', 'openvino-genai', 'transformers'"
    code = f"from importlib.metadata import version; print(', '.join(n + ' ' + version(n) for n in ({names})))"
    theirs = measure([str(python), "-c", code])[2].strip()
    today = datetime.datetime.now(datetime.UTC).date()
    reads = f"{threads} threads, which read {read_bandwidth(threads) / 1e9:.0f} GB/s"
    return (
        f"{today}, {processor()}, {reads}; phimoe-onnx {__version__}, ONNX Runtime {ort.__version__}, "
        f"PyTorch {torch.__version__}; {theirs}.\n"
    )


if __name__ == "__main__":
    main()
