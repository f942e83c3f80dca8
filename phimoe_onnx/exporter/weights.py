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

from phimoe_onnx.checkpoint.data import is_finite
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.errors import CheckpointError
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.strips import Strips, expert_bytes, pack_expert
from phimoe_onnx.exporter.recipe import LAYER, Recipe, RoundRows

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
        pieces = [job_piece(partial(_cast, part, dtype), part.rows.shape, dtype, part.layer) for part in parts]
        super().__init__(name, dtype, shape, pieces, parts[0].parameter)


def parts_of(parameter: str, shape: Sequence[int], rows: Sequence[Rows]) -> list[Part]:
    """A parameter's rows with its name, and of a stack [E, N, K] with the number of their expert."""
    each = len(rows) // shape[0] if len(shape) == 3 else 0  # rows of an expert
    return [Part(part, parameter, index // each if each else None) for index, part in enumerate(rows)]


def _cast(part: Part, dtype: ir.DataType) -> torch.Tensor:
    return narrowed(part.rows.read(), FLOATS[dtype], part.parameter, part.expert)


def narrowed(tensor: torch.Tensor, dtype: torch.dtype, parameter: str, expert: int | None = None) -> torch.Tensor:
    """The tensor in `dtype`.

    Raises:
        CheckpointError: a number of it is too large for that; `parameter` and `expert` name the tensor.
    """
    cast = tensor.to(dtype)
    if dtype.itemsize < tensor.dtype.itemsize or dtype == torch.float16:
        _check_finite(cast, tensor, parameter, expert)
    return cast


def _check_finite(stored: torch.Tensor, given: torch.Tensor, parameter: str, expert: int | None) -> None:
    if is_finite(stored):
        return
    which = parameter if expert is None else f"{parameter}, expert {expert},"
    name = str(stored.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"{which} holds numbers up to {float(given.abs().max()):.3g}, too large for {name}, which ends at "
        f"{torch.finfo(stored.dtype).max:.3g}; use --quantize none or int8 on the CPU, or --dtype bfloat16 on CUDA"
    )


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
        stored = []
        for part in parts:
            rows = part.rows.read()
            stored.append(round_rows(rows, format, part.parameter, part.expert))
            _check_finite(stored[-1][1], rows, part.parameter, part.expert)
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


def in_columns(name: str, parts: Sequence[Part], format: Format, recipe: Recipe) -> tuple[Weight, Weight]:
    """A matrix [N, K] as standard operators read it: levels, intN [K, N], and scales [K / block_size, N]; one job.

    `parts` follow each other along N, but for an expert's gate and up, whose rows take turns.
    """
    job = rounding_job(parts, format, recipe, interleaved)
    n, k = sum(part.rows.shape[0] for part in parts), parts[0].rows.shape[1]

    def run() -> tuple[torch.Tensor, ...]:
        codes, scales = job.run()
        columns = format.unpack(codes, k).T.flatten() ^ 1 << format.bits - 1  # signed, by its highest bit
        return format.pack(columns), scales.T.contiguous()

    stored = Job(run, job.nbytes, job.layer)
    expert = parts[0].expert
    number = "" if expert is None else f".{expert}"
    dtypes = (ir.DataType[format.dtype.upper()], DTYPES[format.scale_dtype])
    shapes = ((k, n), (k // format.block_size, n))
    levels, scales = (
        Weight(f"{name}.{kind}{number}", dtype, shape, [Piece(stored, index)], parts[0].parameter, expert)
        for index, (kind, dtype, shape) in enumerate(zip(("levels", "scales"), dtypes, shapes, strict=True))
    )
    return levels, scales


def interleaved(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of two matrices in turns."""
    return torch.stack(tuple(matrices), dim=1).flatten(0, 1)


def in_strips(name: str, weight: Parameter, form: Strips, recipe: Recipe) -> Weight:
    """The parameter [N, K] as uint8 [strips, strip_bytes]; a job a part, and each but the last fills its strips."""
    round_rows = recipe.round_rows()

    def job(part: Part) -> Job:
        run = partial(_rounded, part, form, round_rows)
        return Job(lambda: (run(),), form.nbytes(*part.rows.shape), part.layer)

    k = weight.parts[0].rows.shape[1]
    jobs = [job(part) for part in weight.parts]
    strips = sum(nbytes for each in jobs for nbytes in each.nbytes) // form.strip_bytes(k)
    pieces = [Piece(each, 0) for each in jobs]
    return Weight(f"{name}.strips", ir.DataType.UINT8, (strips, form.strip_bytes(k)), pieces, weight.parameter)


def experts_in_strips(name: str, gate_up: Parameter, down: Parameter, recipe: Recipe) -> Weight:
    """Two stacks, gate and up [E, 2 I, H] and down [E, H, I], as uint8 [E, expert_bytes]; a job an expert."""
    number, hidden_size, intermediate_size = down.shape.numpy()
    pairs, rest = recipe.form(gate_up.parameter), recipe.form(down.parameter)
    assert isinstance(pairs, Strips)
    assert isinstance(rest, Strips)
    round_rows = recipe.round_rows()
    nbytes = expert_bytes(pairs, rest, hidden_size, intermediate_size)

    def job(expert: int) -> Job:
        gate, up = gate_up.parts[2 * expert : 2 * expert + 2]

        def run() -> tuple[torch.Tensor]:
            matrices = ((gate, pairs), (up, pairs), (down.parts[expert], rest))
            return (pack_expert(*(_rounded(part, form, round_rows) for part, form in matrices)),)

        return Job(run, (nbytes,), gate.layer)

    pieces = [Piece(job(expert), 0) for expert in range(number)]
    return Weight(f"{name}.strips", ir.DataType.UINT8, (number, nbytes), pieces, gate_up.parameter)


def _rounded(part: Part, form: Strips, round_rows: RoundRows) -> torch.Tensor:
    (strips,) = round_rows(part.rows.read(), form, part.parameter, part.expert)
    return strips


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as uint8 [nbytes], row-major; without a copy where it is contiguous."""
    array: np.ndarray = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return array
