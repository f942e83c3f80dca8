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

from phimoe_onnx.checkpoint.tensors import Rows

FLOATS = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Job:
    """One unit of the work of writing: a call that gives one tensor or several, and their sizes in bytes beforehand."""

    run: Callable[[], tuple[torch.Tensor, ...]]
    nbytes: tuple[int, ...]


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
    """An initializer made of pieces that follow each other along its first axis."""

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        super().__init__(self._compute, dtype, ir.Shape(shape), name=name)

    def _compute(self) -> ir.Tensor:
        data = np.concatenate([tensor_bytes(piece.job.run()[piece.index]) for piece in self.pieces])
        return ir.Tensor(data.view(self.dtype.numpy()).reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)


class Parameter(Weight):
    """A weight that is still as in the checkpoint: its rows, one under the other, cast to `dtype`."""

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int], rows: Sequence[Rows]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            name, dtype, shape, [job_piece(partial(_cast, part, dtype), part.shape, dtype) for part in rows]
        )


def _cast(rows: Rows, dtype: ir.DataType) -> torch.Tensor:
    return rows.read().to(FLOATS[dtype])


def job_piece(run: Callable[[], torch.Tensor], shape: Sequence[int], dtype: ir.DataType) -> Piece:
    """The only output of a job of its own."""
    return Piece(Job(lambda: (run(),), (math.prod(shape) * FLOATS[dtype].itemsize,)), 0)


def stacked(name: str, parameters: Sequence[Parameter]) -> Parameter:
    """The parameters one under the other: [N1, ...] and [N2, ...] become [N1 + N2, ...]."""
    first = parameters[0]
    shape = (sum(int(parameter.shape[0]) for parameter in parameters), *first.shape[1:])
    return Parameter(name, first.dtype, shape, [rows for parameter in parameters for rows in parameter.rows])


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as uint8 [nbytes], row-major; without a copy where it is contiguous."""
    array: np.ndarray = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return array
