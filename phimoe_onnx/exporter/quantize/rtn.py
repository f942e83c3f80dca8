"""Round to nearest, block by block."""

from __future__ import annotations

import torch

from phimoe_onnx.exporter.quantize.format import Format

# Weights that are rounded at once: few enough for a core's cache, enough for threads not to queue for the GIL.
SLAB = 1 << 19
# Added to a float32 it leaves no bits for a fraction, so the low ones are those of the nearest integer.
ROUND = 3.0 * (1 << 22)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def round_to_nearest(
    weight: torch.Tensor, format: Format, parameter: str, expert: int | None
) -> tuple[torch.Tensor, ...]:
    """Rows [..., N, K] -> codes uint8 [..., N, K * bits / 8] and scales [..., N, K / block_size].

    The scale is signed, so that the block's largest magnitude falls on the lowest code, whose magnitude is one step
    larger than the highest's: all 2 ** bits codes are used. Values are off by half a step at most, but for those
    within half a step of the largest magnitude with the other sign, which are clipped to one step less.

    Args:
        weight: some rows of a parameter, in any dtype.
        format: a symmetric one.
        parameter: its name in modeling.py, and `expert`, the matrix of a stack: every one is rounded alike here.
        expert: see `parameter`.
    """
    assert format.symmetric
    *outer, k = weight.shape
    rows = weight.reshape(-1, k)
    width, blocks = format.widths(k)
    codes = torch.empty(len(rows), width, dtype=torch.uint8)
    scales = torch.empty(len(rows), blocks, dtype=DTYPES[format.scale_dtype])
    step = max(1, SLAB // k)
    for slab in (slice(start, start + step) for start in range(0, len(rows), step)):
        _round_slab(rows[slab], format, codes[slab], scales[slab])
    return codes.view(*outer, -1), scales.view(*outer, -1)


def _round_slab(rows: torch.Tensor, format: Format, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Fills `codes` and `scales` for some rows."""
    blocks = rows.to(torch.float32, copy=True).unflatten(-1, (-1, format.block_size))
    low, high = blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
    zero = 1 << (format.bits - 1)
    scales.copy_((torch.where(-low > high, low, high) / -zero).squeeze(-1))
    scale = scales.float().unsqueeze(-1)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    rounded = blocks.mul_(inverse).clamp_(-zero, zero - 1).add_(ROUND + zero)
    wide = rounded.view(torch.int32).to(torch.uint8).flatten(-2)
    if format.bits == 4:  # two codes as one little-endian int16, 0x0b0a, whose low byte becomes 0xba
        pairs = wide.view(torch.int16)
        wide = pairs.bitwise_or(pairs >> 4)
    codes.copy_(format.pack(wide) if format.bits == 2 else wide)
