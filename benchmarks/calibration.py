"""Measures what a calibration takes for a published shape, with random weights, and computes the whole.

    python -m benchmarks.calibration [--shape Phi-mini-MoE] [--tokens 100000] [--measured 4096 12288] [--experts 4]
    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.calibration --shape Phi-3.5-MoE --divide 4

Time: one layer of four experts is calibrated twice, with texts of two lengths. Each part of the work takes a constant
time and as much again for each token; both are fitted and set in for the whole. An expert counts the tokens that chose
it. Of four experts each gets half of all tokens, so `--measured 12288` stands for 49,152 tokens of a model of sixteen.
It is said by the clock and in seconds of the processor, of all threads; OMP_NUM_THREADS sets how many there are. What
else runs on the machine changes the latter less.

Memory (--divide N): takes an Nth of all widths, of the tokens and of the rows that are worked on at once. Whatever
takes much memory is a product of two of these, so it is an N^2th and is multiplied again. It is computed for the
default number of tokens, and set beside what --plan says. The variable is for glibc, which gives back at once only what
is larger, as all arrays of a whole layer are.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.shapes import SHAPES
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import PhiMoEConfig, parse_config, read_config
from phimoe_onnx.exporter import calibrate
from phimoe_onnx.exporter.calibration_folder import CalibrationFolder
from phimoe_onnx.exporter.plan import CALIBRATION_TOKENS, requirements
from phimoe_onnx.exporter.quantize import calibrated, gptq
from phimoe_onnx.exporter.recipe import Recipe, recipe_for
from phimoe_onnx.exporter.target import CPU
from phimoe_onnx.layered import checkpoint_weights
from phimoe_onnx.memory import peak_memory
from phimoe_onnx.scratch import LIMIT
from tests.checkpoints import random_ids, write_checkpoint

WINDOW = 4096  # between a calibration's short and long ones
EXPERTS = 4
VOCABULARY = 4096  # where time is measured; the rest of lm_head takes as long for each row
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PARTS = ("attention", "expert", "lm_head")
Seconds = np.ndarray  # by the clock, and of the processor


@dataclass
class Measured:
    """The tokens of each part's runs, and what each run took."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, list[Seconds]] = field(default_factory=lambda: defaultdict(list))

    def add(self, part: str, tokens: int, seconds: Seconds) -> None:
        """Takes a run."""
        self.tokens[part].append(tokens)
        self.seconds[part].append(seconds)

    def fitted(self, part: str) -> np.ndarray:
        """[2, 2]: what each token takes, and what is constant, each as `Seconds`; least squares."""
        return np.polyfit(self.tokens[part], np.array(self.seconds[part]), 1)


class Enough(Exception):
    """Ends a layer after as many experts as were asked for."""


def main() -> None:
    """Measures time, or memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="Phi-mini-MoE", help="default: Phi-mini-MoE")
    add("--tokens", type=int, default=100_000, metavar="N", help="of the whole (default: 100000)")
    add("--measured", type=int, nargs=2, default=[4096, 12288], metavar="N", help="tokens (default: 4096 12288)")
    add("--experts", type=int, choices=range(1, EXPERTS + 1), default=EXPERTS, help=f"so many (default: {EXPERTS})")
    add("--divide", type=int, metavar="N", help="measure memory with an Nth of all sizes")
    add("--folder", type=Path, metavar="DIR", help="where checkpoints are written (default: temporary files)")
    arguments = parser.parse_args()
    if min(arguments.measured) < calibrate.SAMPLE or len(set(arguments.measured)) < 2:
        parser.error(f"--measured is {arguments.measured}, expected two numbers of at least {calibrate.SAMPLE}")
    config = parse_config(SHAPES[arguments.shape])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.divide:
            measure_memory(Path(folder), config, arguments.divide)
        else:
            measure_time(Path(folder), config, arguments.measured, arguments.experts, arguments.tokens)


def measure_time(folder: Path, config: PhiMoEConfig, lengths: list[int], experts: int, tokens: int) -> None:
    """Prints what each part takes, and the whole."""
    measured = Measured()
    source = write(folder, {name: getattr(config, name) for name in WIDTHS}, VOCABULARY)
    for length in lengths:
        windows = [random_ids(min(WINDOW, length - start), start) for start in range(0, length, WINDOW)]
        run(source, folder / str(length), windows, measured, experts)
    print(f"{tokens} tokens, {torch.get_num_threads()} threads; by the clock, of the processors")
    count = config.num_local_experts
    parts = {"attention": tokens, "expert": 2 * tokens // count, "lm_head": tokens}
    each = {}
    for part, own in parts.items():
        rate, constant = measured.fitted(part)
        if part == "lm_head":
            constant = constant * config.vocab_size / VOCABULARY
        each[part] = constant + rate * own
        found = ", ".join(
            f"{count}: {clock:.1f} s {cpu:.1f} s"
            for count, (clock, cpu) in zip(measured.tokens[part], measured.seconds[part], strict=True)
        )
        print(f"{part}: tokens {found}")
        for name, (clock, cpu) in (("constant", constant), ("1000 tokens", 1000 * rate), (f"{own} tokens", each[part])):
            print(f"    {name}: {clock:.2f} s, {cpu:.2f} s")
    layer = each["attention"] + count * each["expert"]
    clock, cpu = (config.num_hidden_layers * layer + each["lm_head"]) / 3600
    print(f"the whole: {clock:.1f} hours, {cpu:.1f} hours of the processors")


def measure_memory(folder: Path, config: PhiMoEConfig, divide: int) -> None:
    """Prints the peak."""
    for module in (gptq, calibrated):
        module.ROWS //= divide
    for name in ("CHUNK", "QUERIES", "SAMPLE"):
        setattr(calibrate, name, getattr(calibrate, name) // divide)
    windows, tokens = [random_ids(WINDOW // divide)], WINDOW
    tiny = write(folder / "tiny", {}, 2048)
    run(tiny, folder / "tiny", windows, Measured(), EXPERTS)  # loads what is loaded at the first use
    before = peak_memory() or 0
    source = write(folder, {name: getattr(config, name) // divide for name in WIDTHS}, config.vocab_size // divide)
    run(source, folder / "run", windows, Measured(), EXPERTS)
    peak = before + divide**2 * ((peak_memory() or 0) - before)
    most = peak - states(config, tokens) + min(states(config, CALIBRATION_TOKENS), LIMIT)
    plan = requirements(config, recipe(config)).export_memory
    print(f"peak memory {gib(peak)}; with {CALIBRATION_TOKENS} tokens {gib(most)}; --plan says {gib(plan)}")


def write(folder: Path, widths: dict[str, int], vocabulary: int) -> Path:
    """A checkpoint of one layer."""
    source, layer = folder / "checkpoint", {"num_hidden_layers": 1, "num_local_experts": EXPERTS}
    options = {"dtype": torch.bfloat16, "max_position_embeddings": WINDOW, "vocab_size": vocabulary, **layer, **widths}
    writer = get_context("spawn").Process(target=write_checkpoint, args=(source,), kwargs=options)
    writer.start()  # by itself: what it takes in memory is not the calibration's
    writer.join()
    return source


@torch.inference_mode()
def run(source: Path, folder: Path, windows: list[list[int]], measured: Measured, experts: int) -> None:
    """Calibrates the layer, or so many of its experts, and lm_head."""
    config = read_config(source)
    folder.mkdir(exist_ok=True)
    output = CalibrationFolder(folder / "bundle")
    output.begin("a benchmark")
    tokens = sum(map(len, windows))
    seconds: dict[str, Seconds] = defaultdict(lambda: np.zeros(2))
    now, start = "", clocks()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal now, start
        seconds[now] += clocks() - start
        print(phase, file=sys.stderr)
        step = phase.removeprefix("calibrating: ").removeprefix("layer 1 of 1, ").split(", error")[0]
        if step == f"expert {experts} of {EXPERTS}" == now:
            raise Enough
        now, start = step, clocks()

    rows = parameters(config, read_headers(source))
    told = calibrate._Told(config, rows, report)
    walk = calibrate._Walk(config, recipe(config), checkpoint_weights(config, rows), windows, output, told)
    walk.embed()
    with contextlib.suppress(Enough):
        walk.layer(0)
    now, start = "attention", clocks()  # which counts what is once in a layer
    output.finish(1, walk.x, walk.y)
    walk.head()
    for fact in output.facts():
        measured.add("expert", fact.tokens, seconds[f"expert {fact.expert + 1} of {EXPERTS}"])
    for part in ("attention", "lm_head"):
        measured.add(part, tokens, seconds[part])


def clocks() -> Seconds:
    """Now."""
    return np.array([time.perf_counter(), time.process_time()])


def recipe(config: PhiMoEConfig) -> Recipe:
    """What is measured: int4 of native operators."""
    return recipe_for(config, CPU, "int4", operators="native", calibrate=True)


def states(config: PhiMoEConfig, tokens: int) -> int:
    """Bytes of both streams' hidden states."""
    heads = config.num_attention_heads * config.head_dim
    return 4 * tokens * (4 * config.hidden_size + max(2 * heads, config.intermediate_size))


def gib(size: int) -> str:
    """A size for a person."""
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
