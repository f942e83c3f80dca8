"""Rounding with two levels of scales: integers inside a superblock, one float for it.

The grid is that of progressive group quantisation (QServe, arXiv 2405.04532), fitted by least squares. A weight is
S * s * level (strips.py), and so scale * level with scale = S * s, which float32 holds exactly: the native operators
and ONNX Runtime's read the same numbers.

Every operation and its order is that of native/FORMAT.md, "Rounding". The library of the native operators gives the
same bytes, many times faster; it is taken where it is built (two_level_native.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from phimoe_onnx.checkpoint.data import is_finite
from phimoe_onnx.errors import CheckpointError
from phimoe_onnx.exporter.quantize import two_level_native
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.rtn import DTYPES, SLAB
from phimoe_onnx.exporter.quantize.strips import BLOCK, STRIP, TILE, Strips, superblock_size

LOWEST, HIGHEST = -8, 7  # levels of 4 bits
HIGHEST_8 = 127
LARGEST_SCALE = 15
SHARES = (0.8, 0.9, 1.0)  # tried for a block's scale, of the one that clips nothing
STEPS = (-2, -1, 0, 1, 2)  # tried for a block's integer, beside the nearest
SMALLEST = 2.0**-100  # a smaller step counts as none: its inverse could be infinite


def round_two_level(weight: Tensor, form: Format | Strips, parameter: str, expert: int | None) -> tuple[Tensor, ...]:
    """Rows [..., N, K] -> as strips, uint8 [strips, strip_bytes] of [N, K], or as `form` lays out codes and scales.

    Args:
        weight: rows in any dtype; for strips one matrix, whole or a multiple of 16 rows of it.
        form: strips, or a symmetric format of blocks of 16 or 32.
        parameter: its name in modeling.py, and `expert`, the matrix of a stack: every one is rounded alike here.
        expert: see `parameter`.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    *outer, k = weight.shape
    rows = weight.reshape(-1, k)
    native = two_level_native.function()
    stored = _rounded(rows, form) if native is None else two_level_native.rounded(native, rows, form)
    if stored is None:
        which = parameter if expert is None else f"{parameter}, expert {expert},"
        raise CheckpointError(
            f"{which} holds numbers that are not finite (NaN or infinity); the checkpoint or the adapter is damaged"
        )
    if isinstance(form, Strips):
        return stored
    codes, scales = stored
    return codes.view(*outer, -1), _in_blocks(scales, form, k).view(*outer, -1)


def laid_out(form: Format | Strips, levels: Tensor, s: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    """Levels [N, K], s [N, K / 32, rounded up] and S [N, superblocks], as `Strips.pack` has them, in either layout."""
    if isinstance(form, Strips):
        return (form.pack(levels, s, S),)
    codes, scales = _in_rows(form, levels, s, S)
    return codes, _in_blocks(scales, form, levels.shape[1])


def split(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The two levels of the float32 scales [..., blocks] of superblocks: S, bfloat16 [...], and s, uint8 [..., blocks].

    Of all S and s whose products are the scales it is those with the largest s; S has the scales' sign. Where there are
    none S is NaN.
    """
    high, low = scales.amax(dim=-1), scales.amin(dim=-1)
    top = torch.where(high > -low, high, low)
    S = torch.where(top == 0, 0.0, torch.nan)
    s = torch.zeros_like(scales)
    for largest in range(1, LARGEST_SCALE + 1):
        outer = (top / largest).bfloat16().float()
        inner = (scales / outer.unsqueeze(-1)).round()
        fits = ((inner * outer.unsqueeze(-1) == scales) & (inner >= 0)).all(dim=-1)
        S, s = torch.where(fits, outer, S), torch.where(fits.unsqueeze(-1), inner, s)
    return S.bfloat16(), s.to(torch.uint8)


def _rounded(rows: Tensor, form: Format | Strips) -> tuple[Tensor, ...] | None:
    """Strips, or codes and the scales of blocks of 32; None where a number is not finite."""
    if not is_finite(rows):
        return None
    step = max(1, SLAB // rows.shape[1] // STRIP) * STRIP
    slabs = []
    for start in range(0, len(rows), step):
        fitted = _fit(rows[start : start + step], form.bits)
        slabs.append((form.pack(*fitted),) if isinstance(form, Strips) else _in_rows(form, *fitted))
    return tuple(torch.cat(part) for part in zip(*slabs, strict=True))


def _in_rows(form: Format, levels: Tensor, s: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    codes = form.pack((levels.to(torch.int16) + (1 << form.bits - 1)).to(torch.uint8))
    outer = S.float().repeat_interleave(superblock_size(levels.shape[1]) // BLOCK, dim=1)[:, : s.shape[1]]
    return codes, outer * s


def _in_blocks(scales: Tensor, form: Format, k: int) -> Tensor:
    scales = scales.repeat_interleave(BLOCK // form.block_size, dim=1)[:, : k // form.block_size]
    return scales.to(DTYPES[form.scale_dtype])


def _fit(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, int8 [N, K], s, uint8 [N, K / 32, rounded up], and S, bfloat16 [N, superblocks]."""
    n, k = rows.shape
    weights = pad(rows.float(), (0, -k % TILE)).view(n, -1, superblock_size(k) // BLOCK, BLOCK)
    weights = weights.permute(3, 0, 1, 2).contiguous()  # [32, N, superblocks, blocks]: a sum over a block adds tensors
    exponents = (weights.abs().amax(dim=(0, 3)).view(torch.int32) >> 23).clamp(1, 253)
    weights *= ((254 - exponents) << 23).view(torch.float32).unsqueeze(-1)
    levels, s, outer = _fit_8(weights) if bits == 8 else _fit_4(weights)
    S = (outer * (exponents << 23).view(torch.float32)).bfloat16()
    if bits < 8:
        S, s = split(S.float().unsqueeze(-1) * s)
    levels = levels.permute(1, 2, 3, 0).reshape(n, -1)[:, :k]
    return levels.to(torch.int8), s.to(torch.uint8).view(n, -1)[:, : -(-k // BLOCK)], S


def _fit_8(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, s and S of 8 bits; nothing is clipped."""
    wanted = weights.abs().amax(dim=(0, 3)) / HIGHEST_8
    near = wanted.bfloat16()
    outer = torch.where(near.float() < wanted, (near.view(torch.int16) + 1).view(torch.bfloat16), near).float()
    levels = (weights * _inverse(outer).unsqueeze(-1)).clamp_(-HIGHEST_8, HIGHEST_8).round_()
    return levels, torch.ones_like(weights[0]), outer


def _fit_4(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, s and S of 4 bits, by least squares of the weights' errors.

    1. Each block by itself: of a few scales the one with the least error after its own refit, <w, q> / <q, q>.
    2. S takes the largest of them to 15; s is the best of five neighbours.
    3. S is refitted under s and the levels, which are rounded once more.
    """
    scale = _best_scale(weights)
    outer = (scale.amax(dim=-1) / LARGEST_SCALE).bfloat16().float()
    nearest = (scale * _inverse(outer).unsqueeze(-1)).round()
    best = torch.full_like(scale, torch.inf)
    s, product, square = (torch.zeros_like(scale) for _ in range(3))
    for step in STEPS:
        inner = (nearest + step).clamp(1, LARGEST_SCALE)
        unit = inner * outer.unsqueeze(-1)
        p, q = _moments(weights, _inverse(unit))
        error = unit * (unit * q - 2 * p)  # less the weights' own square
        better = error < best
        best, s = torch.where(better, error, best), torch.where(better, inner, s)
        product, square = torch.where(better, p, product), torch.where(better, q, square)
    s = torch.where(scale > 0, s, 0.0)
    product, square = _sum((product * s).unbind(-1)), _sum((square * s * s).unbind(-1))
    outer = torch.where(square > 0, product / square, outer).bfloat16().float()
    return _levels(weights, _inverse(s * outer.unsqueeze(-1))), s, outer


def _best_scale(weights: Tensor) -> Tensor:
    """Each block's own, [N, superblocks, blocks]; 0 for a block of zeros."""
    whole = torch.maximum(weights.amin(dim=0) / LOWEST, weights.amax(dim=0) / HIGHEST)
    best, scale = torch.full_like(whole, -1.0), torch.zeros_like(whole)
    for share in SHARES:
        product, square = _moments(weights, _inverse(whole * share))
        refitted = product / square.clamp_min(1)
        gain = product * refitted  # by how much the block's squared error falls
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, refitted, scale)
    return scale


def _moments(weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """<w, q> and <q, q> of each block."""
    levels = _levels(weights, inverse)
    return _sum(weights * levels), _sum(levels * levels)


def _levels(weights: Tensor, inverse: Tensor) -> Tensor:
    return (weights * inverse).clamp_(LOWEST, HIGHEST).round_()


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """One after the other, from 0: torch's own sum has an order for each processor."""
    first, *rest = parts
    total = first + 0.0
    for part in rest:
        total += part
    return total


def _inverse(unit: Tensor) -> Tensor:
    return torch.where(unit < SMALLEST, 0.0, 1 / unit)
