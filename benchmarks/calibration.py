"""Measures what a calibration takes for one layer of a published shape, with random weights, and computes the whole.

python -m benchmarks.calibration [--inner 960] [--layers 32] [--tokens 3072] [--folder FOLDER]

The checkpoint has one layer with two experts, so that each of them gets as many tokens as the text has; with sixteen
that is the share of eight times as many. Processor seconds count, of all threads, which another program on the machine
changes little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.calibrate import calibrate
from phimoe_onnx.exporter.calibration_folder import CalibrationFolder
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import CPU
from phimoe_onnx.memory import peak_memory
from tests.checkpoints import random_ids, write_checkpoint

WINDOW = 1024


def main() -> None:
    """Writes the checkpoint, runs the walk and prints its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--inner", type=int, default=960, metavar="N", help="intermediate_size (default: 960, Phi-mini-MoE's)")
    add("--layers", type=int, default=32, metavar="N", help="of the whole model (default: 32)")
    add("--tokens", type=int, default=3072, metavar="N", help="of the text (default: 3072)")
    add("--folder", type=Path, metavar="DIR", help="where the checkpoint is written (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        seconds = measure(Path(folder), arguments.inner, arguments.tokens)
    expert = (seconds["expert 1 of 2"] + seconds["expert 2 of 2"]) / 2
    attention = seconds["attention"]
    whole = arguments.layers * (8 * attention + 16 * expert) / 3600
    print(f"hidden size 4096, inner {arguments.inner}, {arguments.tokens} tokens, {torch.get_num_threads()} threads")
    print(f"attention and pooled moments {attention:.1f} s, an expert {expert:.1f} s of the processors")
    print(f"{arguments.layers} layers of 16 experts, {8 * arguments.tokens} tokens: at most {whole:.1f} hours of them")
    print(f"peak memory {(peak_memory() or 0) / 2**30:.2f} GiB")


def measure(folder: Path, inner: int, tokens: int) -> dict[str, float]:
    """Processor seconds of each step of the layer."""
    source = write_checkpoint(
        folder / "checkpoint",
        dtype=torch.bfloat16,
        hidden_size=4096,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=2,
        max_position_embeddings=WINDOW,
    )
    config = read_config(source)
    recipe = recipe_for(config, CPU, "int4", operators="native", calibrate=True)
    output = CalibrationFolder(folder / "bundle")
    output.begin("a benchmark")
    seconds: dict[str, float] = {}
    now, start = "", time.process_time()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal now, start
        if now:
            seconds[now] = seconds.get(now, 0.0) + time.process_time() - start
        now, start = (
            (phase.removeprefix("calibrating: ").removeprefix("layer 1 of 1, ").split(", error")[0]),
            time.process_time(),
        )

    windows = [random_ids(WINDOW, seed) for seed in range(tokens // WINDOW)]
    rows = parameters(config, read_headers(source))
    calibrate(config, recipe, rows, windows, output, report)
    return seconds


if __name__ == "__main__":
    main()
