"""Weights that are described now and computed when the bundle is written, piece by piece, so that no model is ever in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import LAYER, Recipe

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
FLOATS = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
PARTS = ("codes", "scales", "zeros")  # of a weight in blocks; a graph's initializers end so


@dataclass(frozen=True, eq=False)
class Job:
    """One unit of the work of writing: a call that gives one tensor or several, and their sizes in bytes beforehand.

    `layer` is the decoder layer whose parameter it writes: -1 comes before all layers, `AFTER` after them. Jobs are
    begun in that order (write.py).
    """

    run: Callable[[], tuple[torch.Tensor, ...]]
    nbytes: tuple[int, ...]
    layer: int


AFTER = 1 << 30


@dataclass(frozen=True)
class Piece:
    """One output of a job, which fills a contiguous range of a weight."""

    job: Job
    index: int

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.job.nbytes[self.index]


class Weight(ir.LazyTensor):
    """An initializer made of pieces that follow each other along its first axis.

    Attributes:
        pieces: what it is made of.
        parameter: modeling.py's name of what it stores, the first where it joins several; "" for a table.
        expert: of a stack of experts the one that it stores; None for the whole.
    """

    def __init__(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        parameter: str = "",
        expert: int | None = None,
    ) -> None:
        self.pieces = tuple(pieces)
        self.parameter = parameter
        self.expert = expert
        super().__init__(self._compute, dtype, ir.Shape(shape), name=name)

    def _compute(self) -> ir.Tensor:
        data = np.concatenate([tensor_bytes(piece.job.run()[piece.index]) for piece in self.pieces])
        return ir.Tensor(data.view(self.dtype.numpy()).reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter in the checkpoint, and whose they are."""

    rows: Rows
    parameter: str
    expert: int | None

    @property
    def layer(self) -> int:
        """See `Job`."""
        return layer_of(self.parameter)


class Parameter(Weight):
    """A weight that is still as in the checkpoint: its parts, one under the other, cast to `dtype`."""

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int], parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        pieces = [job_piece(partial(_cast, part.rows, dtype), part.rows.shape, dtype, part.layer) for part in parts]
        super().__init__(name, dtype, shape, pieces, parts[0].parameter)


def parts_of(parameter: str, shape: Sequence[int], rows: Sequence[Rows]) -> list[Part]:
    """A parameter's rows with its name, and of a stack [E, N, K] with the number of their expert."""
    each = len(rows) // shape[0] if len(shape) == 3 else 0  # rows of an expert
    return [Part(part, parameter, index // each if each else None) for index, part in enumerate(rows)]


def _cast(rows: Rows, dtype: ir.DataType) -> torch.Tensor:
    return rows.read().to(FLOATS[dtype])


def layer_of(parameter: str) -> int:
    """The decoder layer of a parameter of modeling.py; see `Job`."""
    if match := LAYER.match(parameter):
        return int(match[1])
    return -1 if "embed_tokens" in parameter else AFTER


def job_piece(run: Callable[[], torch.Tensor], shape: Sequence[int], dtype: ir.DataType, layer: int) -> Piece:
    """The only output of a job of its own."""
    return Piece(Job(lambda: (run(),), (math.prod(shape) * FLOATS[dtype].itemsize,), layer), 0)


def stacked(name: str, parameters: Sequence[Parameter]) -> Parameter:
    """The parameters one under the other: [N1, ...] and [N2, ...] become [N1 + N2, ...]."""
    first = parameters[0]
    shape = (sum(int(parameter.shape[0]) for parameter in parameters), *first.shape[1:])
    return Parameter(name, first.dtype, shape, [part for parameter in parameters for part in parameter.parts])


def in_blocks(name: str, weight: Parameter, format: Format, recipe: Recipe) -> list[Weight]:
    """The parameter [..., N, K] as codes, scales and, without `symmetric`, zeros, [..., N, width] each; a job a part.

    They are called `name`.codes and so on.
    """
    jobs = [rounding_job([part], format, recipe) for part in weight.parts]
    return block_weights(name, jobs, weight.shape.numpy(), format, weight.parameter)


def rounding_job(
    parts: Sequence[Part],
    format: Format,
    recipe: Recipe,
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None,
) -> Job:
    """Reads and rounds each part; `join` puts their codes together where there are several, then scales and zeros."""
    round_rows = recipe.round_rows()

    def run() -> tuple[torch.Tensor, ...]:
        stored = [round_rows(part.rows.read(), format, part.parameter, part.expert) for part in parts]
        if len(stored) == 1 or join is None:
            return stored[0]
        return tuple(join(kind) for kind in zip(*stored, strict=True))

    rows = sum(part.rows.shape[0] for part in parts)
    return Job(run, format.nbytes(rows, parts[0].rows.shape[-1]), parts[0].layer)


def block_weights(
    name: str,
    jobs: Sequence[Job],
    shape: Sequence[int],
    format: Format,
    parameter: str,
    expert: int | None = None,
) -> list[Weight]:
    """Codes, scales and, without `symmetric`, zeros of a matrix or a stack of `shape`, from jobs that give all."""
    *outer, k = shape
    number = "" if expert is None else f".{expert}"
    dtypes = (ir.DataType.UINT8, DTYPES[format.scale_dtype], ir.DataType.UINT8)
    return [
        Weight(
            f"{name}.{PARTS[index]}{number}",
            dtypes[index],
            (*outer, width),
            [Piece(job, index) for job in jobs],
            parameter,
            expert,
        )
        for index, width in enumerate(format.widths(k))
    ]


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as uint8 [nbytes], row-major; without a copy where it is contiguous."""
    array: np.ndarray = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return array
