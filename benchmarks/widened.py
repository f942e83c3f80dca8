"""The trained small model, widened to some 43 B parameters (widen.py), without a checkpoint on the disk: each tensor is
made from the small model's when it is read.

Channels are copied until a hidden state has 4,032 and an expert 6,720, near Phi-3.5-MoE's 4,096 and 6,400. All but the
first of the layers that are like one of the small model's add nothing, but compute and route. So the whole is the small
model's function, through weights of the large shape, and a parity check means as much as with the small model.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import torch
from drawn import every_ten_seconds
from shapes import write_config
from widen import SOURCE, Factors, Maker, Source, config_of, shards

from phimoe_onnx import export
from phimoe_onnx.checkpoint import data


def factors(layers: int) -> Factors:
    """How many times larger what is."""
    return Factors(hidden=21, experts=70, layers=layers)


class Tensors:
    """The tensors of `checkpoint`, in the place of `data.read_tensor`."""

    def __init__(self, checkpoint: Path) -> None:
        self.layers = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]

    @cached_property
    def makers(self) -> dict[str, Maker]:
        """What makes a tensor, by its name."""
        config = json.loads((SOURCE / "config.json").read_text(encoding="utf-8"))
        return {
            name: maker
            for shard in shards(Source(SOURCE), config, factors(self.layers), noise=0.0)
            for name, maker in shard.items()
        }

    def numbers(self, file: Path, tensor: str, index: object) -> torch.Tensor:
        """A whole tensor, bfloat16."""
        return self.makers[tensor]()


@contextlib.contextmanager
def checkpoint(parent: Path, layers: int) -> Iterator[Path]:
    """A folder with the files of so many layers, which take no disk; it is called the same each time."""
    config = json.loads((SOURCE / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name) / f"widened-{layers}-layers"
        write_config(folder, config_of(config, factors(layers)), random_layers=0)
        yield folder


def make(bundle: Path, layers: int) -> None:
    """Exports so many layers in int4 with native operators."""
    with checkpoint(bundle.parent, layers) as source, patch.object(data, "read_tensor", Tensors(source).numbers):
        export(source, bundle, quantize="int4", operators="native", progress=every_ten_seconds())
