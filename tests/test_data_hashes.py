"""The bytes of weights: every .data file that the exporter writes, held against a recorded SHA-256.

    python -m tests.test_data_hashes            compares all that is recorded, some hundred exports
    python -m tests.test_data_hashes --write    records the whole grid, where bytes are to change

pytest takes a part of the grid. A combination that the exporter refuses is recorded as null.

The hashes are the same on every machine. The checkpoints' numbers are a bit generator's raw output, not a normal
distribution's, which vector units round differently. What the exporter does to them is exact, element by element:
copying, transposing, rounding to a shorter float, and block-wise rounding, whose largest number, division and rounding
IEEE 754 fixes, and whose sums have one order (native/FORMAT.md). The tables of cos and sin are not, so their bytes are
left out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

from phimoe_onnx import ExportError, export
from tests.checkpoints import SHAPES, TASKS, write_checkpoint

TABLE = Path(__file__).with_name("data_hashes.json")
TARGETS = ("cpu", "cuda", "portable")
FORMS = ("none", "fp16", "int8", "int4")
ROPE_TABLES = ("cos_cache", "sin_cache")

Key = tuple[str, str, str, str]  # shape, target, form, task
Hashes = dict[str, str]  # by file


def grid() -> list[Key]:
    """Everything."""
    return list(itertools.product(SHAPES, TARGETS, FORMS, TASKS))


def part() -> list[Key]:
    """Every shape once, and one shape for every target and form, and every task."""
    shapes = [(shape, "cpu", "int4", "text-generation") for shape in SHAPES]
    forms = [("tiles", target, form, "text-generation") for target in TARGETS for form in FORMS]
    tasks = [("tiles", "cpu", "int4", task) for task in TASKS]
    return list(dict.fromkeys([*shapes, *forms, *tasks]))


@cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes with the process."""
    return tempfile.TemporaryDirectory()


@cache
def checkpoint(shape: str, task: str) -> Path:
    """A checkpoint of a shape for a task, whose numbers are the same on every machine."""
    folder = write_checkpoint(Path(scratch().name) / "checkpoints" / f"{shape}-{task}", **SHAPES[shape] | TASKS[task])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        raw = np.random.PCG64(number).random_raw(tensor.numel()) >> np.uint64(48)
        numbers = (raw.astype(np.float32) - 2**15) / 2**18  # from -1/8 to 1/8
        tensors[name] = torch.from_numpy(numbers).view(tensor.shape)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def hashes(key: Key) -> Hashes | None:
    """The SHA-256 of each .data file, less the tables of cos and sin; None where the exporter refuses."""
    shape, target, form, task = key
    source = checkpoint(shape, task)
    with tempfile.TemporaryDirectory(dir=scratch().name) as folder:
        try:
            options = {"target": target, "quantize": form, "task": task, "operators": "stock"}
            bundle = export(source, Path(folder) / "bundle", **options)
        except ExportError:
            return None
        data = {path.name: bytearray(path.read_bytes()) for path in sorted(bundle.glob("*.data"))}
        for graph in bundle.glob("*.onnx"):
            for name, value in ir.load(graph).graph.initializers.items():
                tensor = value.const_value
                if name in ROPE_TABLES and isinstance(tensor, ir.ExternalTensor):
                    start, end = tensor.offset or 0, (tensor.offset or 0) + tensor.nbytes
                    data[str(tensor.location)][start:end] = bytes(end - start)
        return {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}


@pytest.mark.parametrize("key", part(), ids="/".join)
def test_the_bytes_are_the_recorded_ones(key: Key) -> None:
    assert hashes(key) == json.loads(TABLE.read_text())["/".join(key)]


def main() -> None:
    """Compares or records the whole grid."""
    parser = argparse.ArgumentParser(description="The SHA-256 of every .data file that the exporter writes.")
    parser.add_argument("--write", action="store_true", help="record them instead of comparing")
    write = parser.parse_args().write
    recorded = json.loads(TABLE.read_text())
    keys = grid() if write else [key for key in grid() if "/".join(key) in recorded]
    found = {"/".join(key): hashes(key) for key in track(keys, "exporting", console=Console(stderr=True))}
    if write:
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        TABLE.write_text(f"{{\n{lines}\n}}\n")
        return
    if changed := [key for key in found if found[key] != recorded[key]]:
        raise SystemExit("\n".join(["changed:", *changed]))
    print(f"{len(found)} of {len(recorded)} recorded combinations are as they were")


if __name__ == "__main__":
    main()
