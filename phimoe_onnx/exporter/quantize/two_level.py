"""Rounding with two levels of scales: integers inside a superblock, one float for it.

The grid is that of progressive group quantisation (QServe, arXiv 2405.04532), fitted by least squares. A weight is
S * s * level (strips.py), and so scale * level with scale = S * s, which float32 holds exactly: the native operators
and ONNX Runtime's read the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.rtn import DTYPES, SLAB
from phimoe_onnx.exporter.quantize.strips import BLOCK, STRIP, TILE, Strips, superblock_size

LOWEST, HIGHEST = -8, 7  # levels of 4 bits
LARGEST_SCALE = 15
SHARES = (0.75, 0.82, 0.88, 0.94, 1.0)  # tried for a block's scale, of the one that clips nothing


def round_two_level(weight: Tensor, form: Format | Strips, parameter: str, expert: int | None) -> tuple[Tensor, ...]:
    """Rows [..., N, K] -> as strips, uint8 [strips, strip_bytes] of [N, K], or as `form` lays out codes and scales.

    Args:
        weight: rows in any dtype; for strips one matrix, whole or a multiple of 16 rows of it.
        form: strips, or a symmetric format of blocks of 32.
        parameter: its name in modeling.py, and `expert`, the matrix of a stack: every one is rounded alike here.
        expert: see `parameter`.
    """
    *outer, k = weight.shape
    rows = weight.reshape(-1, k)
    fit = _fit_8 if form.bits == 8 else _fit_4
    step = max(1, SLAB // k // STRIP) * STRIP
    slabs = [_laid_out(form, k, *fit(rows[start : start + step])) for start in range(0, len(rows), step)]
    parts = [torch.cat(part) for part in zip(*slabs, strict=True)]
    return (parts[0],) if isinstance(form, Strips) else tuple(part.view(*outer, -1) for part in parts)


def _laid_out(form: Format | Strips, k: int, levels: Tensor, s: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    if isinstance(form, Strips):
        return (form.pack(levels, s, S),)
    codes = form.pack((levels.to(torch.int16) + (1 << form.bits - 1)).to(torch.uint8))
    scales = S.float().repeat_interleave(superblock_size(k) // BLOCK, dim=1)[:, : s.shape[1]] * s
    scales = scales.repeat_interleave(BLOCK // form.block_size, dim=1)[:, : k // form.block_size]
    return codes, scales.to(DTYPES[form.scale_dtype])


def _superblocks(rows: Tensor) -> Tensor:
    """[N, K] -> [N, superblocks, blocks, 32], float32, with zeros up to whole tiles; a copy."""
    k = rows.shape[1]
    return pad(rows.to(torch.float32, copy=True), (0, -k % TILE)).view(
        len(rows), -1, superblock_size(k) // BLOCK, BLOCK
    )


def _fit_8(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, s and S of 8 bits; nothing is clipped."""
    n, k = rows.shape
    weights = _superblocks(rows)
    S = _up(weights.abs().amax(dim=(2, 3)) / 127)
    levels = (weights * _inverse(S.float())[..., None, None]).round().clamp(-127, 127)
    return levels.to(torch.int8).view(n, -1)[:, :k], torch.ones(n, -(-k // BLOCK), dtype=torch.uint8), S


def _fit_4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, s and S of 4 bits, by least squares of the weights' errors.

    1. Each block by itself: of a few scales the one with the least error after its own refit, <w, q> / <q, q>.
    2. S takes the largest of them to 15; s is the best of three neighbours.
    3. S is refitted under s and the levels, which are rounded once more.
    """
    n, k = rows.shape
    weights = _superblocks(rows)
    power = torch.frexp(weights.abs().amax(dim=(2, 3))).exponent  # squares of tiny or huge weights are no float32
    weights.mul_(torch.exp2(-power.float())[..., None, None])
    whole = torch.maximum(weights.amin(dim=-1) / LOWEST, weights.amax(dim=-1) / HIGHEST)
    best, scale = torch.full_like(whole, -1.0), torch.zeros_like(whole)
    for share in SHARES:
        levels = _levels(weights, whole * share)
        product, square = _moments(weights, levels)
        square = square.clamp_min(1)
        gain = product.square() / square  # by how much the block's squared error falls
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, product / square, scale)
    S = (scale.amax(dim=-1) / LARGEST_SCALE).bfloat16()
    s = _scales(weights, scale, S)
    unit = s * S.float().unsqueeze(-1)
    levels = _levels(weights, unit)
    product, square = _moments(weights, levels)
    product, square = (product * s).sum(-1), (square * s * s).sum(-1)
    S = torch.where(square > 0, product / square.clamp_min(1), S.float()).bfloat16()
    levels = _levels(weights, s * S.float().unsqueeze(-1))
    S = torch.ldexp(S.float(), power).bfloat16()
    return levels.to(torch.int8).view(n, -1)[:, :k], s.to(torch.uint8).view(n, -1)[:, : -(-k // BLOCK)], S


def _scales(weights: Tensor, wanted: Tensor, S: Tensor) -> Tensor:
    """The integer of each block, float32 [N, superblocks, blocks], with the least error of those around wanted / S."""
    outer = S.float().unsqueeze(-1)
    middle = (wanted * _inverse(outer)).round()
    best = torch.full_like(middle, torch.inf)
    chosen = torch.zeros_like(middle)
    for step in (-1, 0, 1):
        s = (middle + step).clamp(1, LARGEST_SCALE)
        unit = s * outer
        product, square = _moments(weights, _levels(weights, unit))
        error = unit * (unit * square - 2 * product)  # less the weights' own square
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, s, chosen)
    return torch.where(weights.abs().amax(dim=-1) > 0, chosen, 0.0)


def _moments(weights: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """<w, q> and <q, q> of blocks [..., 32]."""
    return torch.linalg.vecdot(weights, levels), torch.linalg.vecdot(levels, levels)


def _levels(weights: Tensor, unit: Tensor) -> Tensor:
    """The levels of blocks [..., 32], whose steps are `unit` [...]."""
    return (weights * _inverse(unit).unsqueeze(-1)).round_().clamp_(LOWEST, HIGHEST)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def _up(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x >= 0."""
    near = x.bfloat16()
    return torch.where(near.float() < x, (near.view(torch.int16) + 1).view(torch.bfloat16), near)
