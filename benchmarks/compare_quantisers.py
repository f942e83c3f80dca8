"""Times our quantiser and llama.cpp's side by side: the same matrices, the same cores, in turns, as a Markdown table.

Run it from the repository's root in an environment that has both:

    pip install llama-cpp-python gguf     # compiles llama.cpp for this machine, about ten minutes
    python -m benchmarks.compare_quantisers [--layers 4] [--rounds 3]

It writes a random bf16 checkpoint of Phi-mini-MoE's shape cut to a few layers, and the same weights as GGUF files in every input
format that llama.cpp's quantiser reads. Everything is read from the page cache; everything is written to the same folder.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median

import gguf
import llama_cpp
import torch

from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.exporter import pipeline
from phimoe_onnx.exporter.checkpoint import parameters, read_headers
from phimoe_onnx.exporter.quantize.rtn import Format
from tests.checkpoints import write_checkpoint

BLOCK = 32
INPUTS = {
    "F32": (gguf.GGMLQuantizationType.F32, torch.float32),
    "F16": (gguf.GGMLQuantizationType.F16, torch.float16),
    "BF16": (gguf.GGMLQuantizationType.BF16, torch.bfloat16),
}
LLAMA_FTYPE_MOSTLY_Q4_0 = 2  # of llama.h


def main() -> None:
    """Prepares, measures in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the checkpoint: 4 (default) are 1.2 B parameters")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each candidate (default: 3)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write, some 18 GB; what is there already is used again")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    checkpoint = prepare(folder / "checkpoint", arguments.layers)
    matrices = read_matrices(checkpoint)
    count = sum(matrix.numel() for matrix in matrices)
    sources = {name: write_gguf(folder / f"{name}.gguf", matrices, *form) for name, form in INPUTS.items()}
    candidates: dict[str, Callable[[], float]] = {
        "llama.cpp, bare, F32 in memory": lambda: bare_llama(matrices),
        "ours, bare, bf16 in memory": lambda: bare_ours(matrices),
        "torch, bare, bf16 in memory": lambda: bare_torch(matrices),
    }
    for name, source in sources.items():
        candidates[f"llama.cpp, {name} GGUF to Q4_0 GGUF"] = lambda source=source: llama(source, folder / "llama.gguf")  # type: ignore[misc]
    candidates["ours, bf16 safetensors to int4 data"] = lambda: ours(checkpoint, folder / "ours")[0]
    candidates["ours, the whole export"] = lambda: ours(checkpoint, folder / "ours")[1]
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(arguments.rounds):
        for name, run in candidates.items():
            seconds[name].append(run())
    print(f"{datetime.date.today()}, {_cpu()}, {os.cpu_count()} cores, {count / 1e9:.2f} B parameters, {arguments.rounds} rounds; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("phimoe-onnx", "torch", "llama-cpp-python")))
    print("\n| candidate | M parameters/s, median | best | worst |\n| --- | --- | --- | --- |")
    for name, runs in seconds.items():
        print(f"| {name} | " + " | ".join(f"{count / value / 1e6:.0f}" for value in (median(runs), min(runs), max(runs))) + " |")
    if not arguments.folder:
        shutil.rmtree(folder)


def prepare(folder: Path, layers: int) -> Path:
    """A random checkpoint of Phi-mini-MoE's shape."""
    if not folder.exists():
        shape = {
            "hidden_size": 4096,
            "intermediate_size": 960,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32064,
        }
        write_checkpoint(folder, shards=layers, dtype=torch.bfloat16, **shape)
    return folder


def read_matrices(checkpoint: Path) -> list[torch.Tensor]:
    """All that both quantise, bf16: every matrix of the model but the routers."""
    rows = parameters(read_config(checkpoint), read_headers(checkpoint))
    return [
        torch.stack([part.read() for part in parts]) if "expert" in name else parts[0].read()
        for name, parts in rows.items()
        if len(parts[0].shape) == 2 and "gate.weight" not in name
    ]
