"""Weights of a full shape without a checkpoint on the disk: they come from the tensors' names.

Of each width some rows are rounded to int4, and a matrix is a choice of their strips by its name. So a bundle is made
of them as fast as the disk writes, and PyTorch can read the very numbers that the bundle stores. The head is rounded by
itself, as rows that are there twice would be two likeliest tokens.

What writes into the residual stream is smaller by the root of twice the number of layers, as in models at the beginning
of their training (Radford et al. 2019), and embeddings are as large as normalised states. Otherwise the first layers
would write over the embeddings, and one token that goes to another expert would become another text.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from shapes import write_checkpoint

from phimoe_onnx import export
from phimoe_onnx.checkpoint import data
from phimoe_onnx.checkpoint.tensors import read_headers
from phimoe_onnx.exporter.quantize import levels
from phimoe_onnx.exporter.quantize.levels import round_to_levels
from phimoe_onnx.exporter.quantize.strips import STRIP, Strips
from phimoe_onnx.progress import Progress

FORM = Strips(4)  # of all matrices but the embeddings and the routers
ROWS = 4096  # that are rounded, of each width
OWN = ("gate.weight", "embed_tokens.weight", "lm_head.weight")  # matrices with numbers of their own
RESIDUAL = ("o_proj.weight", "w2.weight")  # write into the residual stream


def deviation(tensor: str) -> float:
    """The standard deviation of a tensor's numbers."""
    if tensor.endswith("embed_tokens.weight"):
        return 1.0
    return 0.02 / 8 if tensor.endswith(RESIDUAL) else 0.02  # 8 * 8 = 2 * 32 layers


def normal(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Normal numbers by a tensor's name, bfloat16."""
    return (torch.randn(shape, generator=_random(name)) * std).to(torch.bfloat16)


@cache
def strips(k: int, std: float) -> torch.Tensor:
    """`ROWS` rows of k numbers in strips, uint8 [strips, strip_bytes]."""
    (rounded,) = round_to_levels(normal(f"{k} columns", (ROWS, k), std), FORM, "rows", None)
    return rounded


@cache
def strip_numbers(k: int, std: float) -> torch.Tensor:
    """The same as float32 [strips, STRIP, k]."""
    return FORM.unpack(strips(k, std), ROWS, k).view(-1, STRIP, k)


def choice(name: str, n: int) -> torch.Tensor:
    """The numbers of the strips that are the matrix with this name and n rows."""
    return torch.randint(ROWS // STRIP, (-(-n // STRIP),), generator=_random(name))


def _random(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


class Tensors:
    """The tensors of a checkpoint whose files are holes, in the place of `data.read_tensor`."""

    def __init__(self, checkpoint: Path) -> None:
        self.shapes = {name: where.shape for name, where in read_headers(checkpoint).items()}

    def described(self, file: Path, tensor: str, index: object) -> torch.Tensor:
        """A tensor for `rounded`: of a matrix that is a choice the name alone."""
        shape = self.shapes[tensor]
        if len(shape) == 1 or tensor.endswith(OWN):
            return self._own(tensor)
        rows = torch.zeros(1).expand(shape)
        rows.drawn = tensor  # type: ignore[attr-defined]
        return rows

    def numbers(self, file: Path, tensor: str, index: object) -> torch.Tensor:
        """What a bundle of `rounded` matrices stores, but for the embeddings, which it rounds to int8."""
        shape = self.shapes[tensor]
        if tensor == "lm_head.weight":
            (rounded,) = round_to_levels(self._own(tensor), FORM, tensor, None)
            return FORM.unpack(rounded, *shape)
        if len(shape) == 1 or tensor.endswith(OWN):
            return self._own(tensor)
        n, k = shape
        return strip_numbers(k, deviation(tensor))[choice(tensor, n)].view(-1, k)[:n]

    def _own(self, tensor: str) -> torch.Tensor:
        if tensor.endswith("norm.weight"):
            return torch.ones(self.shapes[tensor])
        return normal(tensor, self.shapes[tensor], deviation(tensor))


def rounded(rows: torch.Tensor, form: Any, parameter: str, expert: int | None) -> tuple[torch.Tensor, ...]:
    """In the place of `round_to_levels`: of a choice the strips, each of which has been rounded once."""
    tensor = getattr(rows, "drawn", None)
    if tensor is None:
        return round_to_levels(rows, form, parameter, expert)
    assert form == FORM, f"{parameter} is to be {form}"
    n, k = rows.shape
    return (strips(k, deviation(tensor))[choice(tensor, n)],)


@contextlib.contextmanager
def checkpoint(parent: Path, layers: int) -> Iterator[Path]:
    """A folder with the files of so many layers of Phi-3.5-MoE, which take no disk; it is called the same each time."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name) / f"Phi-3.5-MoE-of-{layers}-layers"
        write_checkpoint(folder, "Phi-3.5-MoE", layers, random_layers=0)
        yield folder


def make(bundle: Path, layers: int) -> None:
    """Exports `layers` of the shape in int4 with native operators."""
    with (
        checkpoint(bundle.parent, layers) as source,
        patch.object(data, "read_tensor", Tensors(source).described),
        patch.object(data, "is_finite", lambda tensor: True),
        patch.object(levels, "round_to_levels", rounded),
    ):
        export(source, bundle, quantize="int4", operators="native", progress=every_ten_seconds())


def every_ten_seconds() -> Progress:
    """Prints how far an export is."""
    shown = time.perf_counter()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal shown
        if time.perf_counter() > shown + 10:
            shown = time.perf_counter()
            print(f"{phase}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

    return report
