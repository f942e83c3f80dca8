"""The rounding that a calibration has found: it is read, not computed (calibrate.py, gptq.py).

While it is on its way to where it is written, a matrix on the grid is an int32 [N, K] in which each weight has all that
it is made of: the level in the low eight bits, s in the next eight, S in the upper sixteen. So its rows are cut and
joined like any others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.gptq import GRIDS, ROWS, Rounded
from phimoe_onnx.exporter.quantize.strips import BLOCK, TILE, Strips, superblock_size
from phimoe_onnx.exporter.quantize.two_level import laid_out, round_two_level, split


def round_calibrated(rows: Tensor, form: Format | Strips, parameter: str, expert: int | None) -> tuple[Tensor, ...]:
    """Rows [N, K] -> as `two_level.round_two_level`, which also rounds what no calibration was at: the embeddings.

    Args:
        rows: int32 as `words` makes them, or numbers; for strips a whole matrix or a multiple of 16 rows of it.
        form: strips, or a symmetric format of blocks of 32 or less.
        parameter: its name in modeling.py.
        expert: of a stack, the one that the rows are of.
    """
    if rows.dtype != torch.int32:
        return round_two_level(rows, form, parameter, expert)
    k = rows.shape[1]
    levels = (rows << 24 >> 24).to(torch.int8)
    s = (rows[:, ::BLOCK] >> 8 & 255).to(torch.uint8)
    S = (rows[:, :: superblock_size(k)] >> 16).to(torch.int16).view(torch.bfloat16)
    if isinstance(form, Strips) and form.bits < 8:
        S, s = _canonical(s, S, k)
    return laid_out(form, levels, s, S)


def _canonical(s: Tensor, S: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of all S [N, superblocks] and s [N, blocks] with these products those that `split` finds in them again."""
    n, blocks = s.shape
    grid = pad(s, (0, -blocks % (TILE // BLOCK))).view(n, -1, superblock_size(k) // BLOCK)
    S, s = split(grid * S.float().unsqueeze(-1))
    return S, s.view(n, -1)[:, :blocks]


def words(rounded: Rounded) -> Tensor:
    """A matrix as int32 [N, K]; see above."""
    k = rounded.levels.shape[1]
    S = rounded.S.view(torch.int16).int().repeat_interleave(superblock_size(k), dim=1)[:, :k]
    s = rounded.s.int().repeat_interleave(BLOCK, dim=1)[:, :k]
    return S << 16 | s << 8 | rounded.levels.int() & 255


def stored(rounded: Rounded, bits: int) -> dict[str, Tensor]:
    """A matrix as tensors for a file: two codes a byte where a code is one of 16 levels or fewer."""
    levels = torch.tensor(GRIDS[bits].levels, dtype=torch.int16)
    slabs = rounded.levels.split(ROWS)  # their places are int64
    codes = torch.cat([torch.bucketize(slab.to(torch.int16), levels).to(torch.uint8) for slab in slabs])
    packed = Format(4, BLOCK).pack(codes) if len(levels) <= 16 else codes
    return {"codes": packed.contiguous(), "s": rounded.s, "S": rounded.S, "bits": torch.tensor(bits)}


def loaded(tensors: dict[str, Tensor], k: int) -> Rounded:
    """What `stored` was given, of matrices [N, k]."""
    levels = torch.tensor(GRIDS[int(tensors["bits"])].levels, dtype=torch.int16)
    codes = tensors["codes"]
    if len(levels) <= 16:
        codes = Format(4, BLOCK).unpack(codes, k)
    return Rounded(levels[codes.int()].to(torch.int8), tensors["s"], tensors["S"])
