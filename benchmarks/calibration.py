"""Measures what a calibration takes for one layer of a published shape, with random weights, and computes the whole.

    python -m benchmarks.calibration [--shape Phi-mini-MoE] [--tokens 3072] [--folder FOLDER]
    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.calibration --shape Phi-3.5-MoE --divide 4

The checkpoint has one layer with two experts, so that each of them gets as many tokens as the text has; with sixteen
that is the share of eight times as many. Processor seconds count, of all threads, which another program on the machine
changes little. Memory is computed for as many tokens as a calibration has at the most, and set beside what --plan says.

--divide N takes an Nth of all widths, of the tokens and of the rows that are worked on at once. Whatever takes much
memory is a product of two of these, so it is an N^2th and is multiplied again; time does not grow so, and is not said.
The variable is for glibc, which gives back at once only what is larger, as all arrays of a whole layer are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

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
from phimoe_onnx.memory import peak_memory
from phimoe_onnx.scratch import LIMIT
from tests.checkpoints import random_ids, write_checkpoint

WINDOW = 1024
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def main() -> None:
    """Writes the checkpoint, runs the walk and prints its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="Phi-mini-MoE", help="default: Phi-mini-MoE")
    add("--tokens", type=int, default=3072, metavar="N", help=f"of the text, in windows of {WINDOW} (default: 3072)")
    add("--divide", type=int, default=1, metavar="N", help="all sizes (default: 1)")
    add("--folder", type=Path, metavar="DIR", help="where the checkpoint is written (default: a temporary one)")
    arguments = parser.parse_args()
    config, divide = parse_config(SHAPES[arguments.shape]), arguments.divide
    windows = [random_ids(WINDOW // divide, seed) for seed in range(arguments.tokens // WINDOW)]
    if not windows:
        parser.error(f"--tokens is {arguments.tokens}, expected at least {WINDOW}")
    for module in (gptq, calibrated):
        module.ROWS //= divide
    calibrate.CHUNK //= divide
    sizes = {name: SHAPES[arguments.shape][name] // divide for name in WIDTHS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder) / "tiny", {}, windows[:1])  # loads what is loaded at the first use
        before = peak_memory() or 0
        seconds = measure(Path(folder) / "layer", sizes, windows)
    tokens, layers, experts = len(windows) * WINDOW, config.num_hidden_layers, config.num_local_experts
    print(f"{arguments.shape}, {tokens} tokens, {torch.get_num_threads()} threads")
    if divide == 1:
        attention, expert = seconds["attention"], (seconds["expert 1 of 2"] + seconds["expert 2 of 2"]) / 2
        whole = (layers * (8 * attention + experts * expert) + 8 * seconds["lm_head"]) / 3600
        print(f"attention and pooled moments {attention:.1f} s, an expert {expert:.1f} s of the processors")
        print(f"{layers} layers of {experts} experts, {8 * tokens} tokens: at most {whole:.1f} hours")
    peak = before + divide**2 * ((peak_memory() or 0) - before)
    most = peak - states(config, tokens) + min(states(config, CALIBRATION_TOKENS), LIMIT)
    plan = requirements(config, recipe(config)).export_memory
    print(f"peak memory {gib(peak)}; with {CALIBRATION_TOKENS} tokens {gib(most)}; --plan says {gib(plan)}")


def measure(folder: Path, sizes: dict[str, int], windows: list[list[int]]) -> dict[str, float]:
    """Processor seconds of each step of a layer of these sizes."""
    layer = {"num_hidden_layers": 1, "num_local_experts": 2, "max_position_embeddings": WINDOW}
    source, options = folder / "checkpoint", {"dtype": torch.bfloat16, **layer, **sizes}
    writer = get_context("spawn").Process(target=write_checkpoint, args=(source,), kwargs=options)
    writer.start()  # by itself: what it takes in memory is not the calibration's
    writer.join()
    config = read_config(source)
    output = CalibrationFolder(folder / "bundle")
    output.begin("a benchmark")
    seconds: dict[str, float] = {}
    now, start = "", time.process_time()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal now, start
        if now:
            seconds[now] = seconds.get(now, 0.0) + time.process_time() - start
        now = phase.removeprefix("calibrating: ").removeprefix("layer 1 of 1, ").split(", error")[0]
        start = time.process_time()
        print(phase, file=sys.stderr)

    rows = parameters(config, read_headers(source))
    calibrate.calibrate(config, recipe(config), rows, windows, output, report)
    return seconds


def recipe(config: PhiMoEConfig) -> Recipe:
    """What is measured: int4 of native operators."""
    return recipe_for(config, CPU, "int4", operators="native", calibrate=True)


def states(config: PhiMoEConfig, tokens: int) -> int:
    """Bytes of both streams' hidden states."""
    return 4 * tokens * (4 * config.hidden_size + 2 * config.num_attention_heads * config.head_dim)


def gib(size: int) -> str:
    """A size for a person."""
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
