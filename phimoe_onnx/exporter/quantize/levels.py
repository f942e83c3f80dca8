"""Two-level rounding to the levels of 2 and 3 bits, which the native operators take from a table; two_level.py has the
other widths.

A weight is S * s * level (strips.py). The tables lie around zero and have no zero: they are near the levels of least
squared error for normal numbers (Lloyd 1957; Max 1960), which are at 0.45 and 1.51 standard deviations for 2 bits, and
at 0.25, 0.76, 1.34 and 2.15 for 3.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.rtn import SLAB, round_to_nearest
from phimoe_onnx.exporter.quantize.strips import BLOCK, LEVELS, STRIP, TILE, Strips, superblock_size
from phimoe_onnx.exporter.quantize.two_level import round_two_level

LARGEST_SCALE = 15
SHARES = {2: (0.62, 0.8), 3: (0.8, 1.0)}  # tried for a block's scale, of the one that clips nothing


def round_to_levels(weight: Tensor, form: Format | Strips, parameter: str, expert: int | None) -> tuple[Tensor, ...]:
    """As `round_two_level`, with strips of 2 and 3 bits as well; 2 bits of ONNX Runtime's operators, which have no such
    levels, are rounded to nearest.
    """
    if isinstance(form, Format) and form.bits == 2:
        return round_to_nearest(weight, form, parameter, expert)
    if not isinstance(form, Strips) or form.bits not in LEVELS:
        return round_two_level(weight, form, parameter, expert)
    step = max(1, SLAB // weight.shape[-1] // STRIP) * STRIP
    slabs = [form.pack(*_fit(rows, form.bits)) for rows in weight.split(step)]
    return (torch.cat(slabs),)


def _fit(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels int8 [N, K], s uint8 [N, blocks] and S bfloat16 [N, superblocks], by least squares of the weights' errors.

    1. Each block by itself: of a few scales the one with the least error after its own refit, <w, q> / <q, q>.
    2. S takes the largest of them to 15; s is the best of three neighbours. A block of weights far below its
       superblock's is better off with s = 0.
    3. S is refitted under s and the levels, which are rounded once more.
    """
    n, k = rows.shape
    weights = pad(rows.to(torch.float32, copy=True), (0, -k % TILE))
    weights = weights.view(n, -1, superblock_size(k) // BLOCK, BLOCK)
    largest = weights.abs().amax(dim=-1)
    power = torch.frexp(largest.amax(dim=-1)).exponent  # squares of tiny or huge weights are no float32
    weights.mul_(torch.exp2(-power.float())[..., None, None])
    whole = torch.ldexp(largest, -power.unsqueeze(-1)) / LEVELS[bits][-1]
    best, scale = torch.full_like(whole, -1.0), torch.zeros_like(whole)
    for share in SHARES[bits]:
        product, square = _moments(weights, _levels(weights, whole * share, bits))
        gain = product.square() / square  # by how much the block's squared error falls
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, product / square, scale)
    S = (scale.amax(dim=-1) / LARGEST_SCALE).bfloat16()
    s = _scales(weights, scale, S, bits)
    product, square = _moments(weights, _levels(weights, s * S.float().unsqueeze(-1), bits))
    product, square = (product * s).sum(-1), (square * s * s).sum(-1)
    S = torch.where(square > 0, product / square.clamp_min(1), S.float()).bfloat16()
    levels = _levels(weights, s * S.float().unsqueeze(-1), bits)
    S = torch.ldexp(S.float(), power).bfloat16()
    return levels.to(torch.int8).view(n, -1)[:, :k], s.to(torch.uint8).view(n, -1)[:, : -(-k // BLOCK)], S


def _scales(weights: Tensor, wanted: Tensor, S: Tensor, bits: int) -> Tensor:
    """The integer of each block, float32 [N, superblocks, blocks], with the least error of those around wanted / S."""
    outer = S.float().unsqueeze(-1)
    middle = (wanted * _inverse(outer)).round()
    best, chosen = torch.zeros_like(middle), torch.zeros_like(middle)  # with s = 0 the error is the weights' own square
    for step in (-1, 0, 1):
        s = (middle + step).clamp(0, LARGEST_SCALE)
        unit = s * outer
        product, square = _moments(weights, _levels(weights, unit, bits))
        error = unit * (unit * square - 2 * product)  # less that square
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, s, chosen)
    return chosen


def _moments(weights: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """<w, q> and <q, q> of blocks [..., 32]; no level is 0, so neither is the second."""
    return torch.linalg.vecdot(weights, levels), torch.linalg.vecdot(levels, levels)


def _levels(weights: Tensor, unit: Tensor, bits: int) -> Tensor:
    """The nearest levels of blocks [..., 32], whose steps are `unit` [...], as float32."""
    magnitudes = [level for level in LEVELS[bits] if level > 0]
    steps = weights.abs() * _inverse(unit).unsqueeze(-1)
    levels = torch.full_like(steps, magnitudes[0])
    for below, above in itertools.pairwise(magnitudes):
        levels += (steps > (below + above) / 2) * float(above - below)
    return levels.copysign_(weights)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)
