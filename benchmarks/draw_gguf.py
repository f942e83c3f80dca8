"""The model of larger_than_memory.py as a Q4_0 GGUF file, for its --gguf: written as fast as the disk writes.

    PYTHONPATH=.:benchmarks PEERS/llama.cpp/bin/python -m benchmarks.draw_gguf FILE.gguf [--layers 32]

PEERS is set_up_peers.py's folder. Weights are those of drawn.py, rounded to Q4_0 once more: of each width some rows
are, and a matrix is a choice of them. All matrices but the routers are Q4_0, embeddings and the head among them. The
factors of longrope are left out: what is read is the same without them.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import torch
from drawn import Tensors, checkpoint, choice, deviation, every_ten_seconds, strip_numbers

from benchmarks.compare_quantisers import begin_gguf, is_quantised, is_stack, rows_of
from phimoe_onnx.checkpoint import data
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import read_config


@cache
def blocks(k: int, std: float) -> np.ndarray:
    """drawn.py's strips of k columns in Q4_0, uint8 [strips, bytes]."""
    numbers = strip_numbers(k, std).numpy()
    return quantised(numbers).reshape(len(numbers), -1)


def quantised(numbers: np.ndarray) -> np.ndarray:
    """Q4_0 blocks of rows, uint8."""
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_0)


def stored(part: Rows, name: str) -> np.ndarray:
    """What the file holds of some rows of a tensor."""
    rows = part.read()
    tensor = getattr(rows, "drawn", None)
    if tensor is not None:
        n, k = rows.shape
        return blocks(k, deviation(tensor))[choice(tensor, n).numpy()]
    numbers = rows.to(torch.float32).numpy()
    return quantised(numbers) if is_quantised(name) else numbers


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    target: Path = arguments.file
    partial, report, done = target.with_name(f"partial-{target.name}"), every_ten_seconds(), 0
    with checkpoint(target.parent, arguments.layers) as source:
        config, described = read_config(source), Tensors(source).described
        with patch.object(data, "read_tensor", described):
            tensors = rows_of(source, config)
            shapes = {}
            for name, parts in tensors.items():
                stack = (len(parts),) if is_stack(name) else ()
                shapes[name] = ((*stack, *parts[0].shape), "Q4_0" if is_quantised(name) else "F32")
            writer = begin_gguf(partial, config, shapes)
            size = sum(each.nbytes for each in writer.tensors[0].values())
            for name, parts in tensors.items():
                written = np.concatenate([stored(part, name) for part in parts])
                writer.write_tensor_data(written)
                done += written.nbytes
                report("writing", done, size)
            writer.close()
    partial.rename(target)


if __name__ == "__main__":
    main()
