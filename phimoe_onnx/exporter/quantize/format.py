"""How a weight lies in memory: plain numbers, or blocks of small integers as com.microsoft's operators read them.

Layout alone: sizes, packing and unpacking. How a number is rounded is a file of its own beside this one. torch is
imported where numbers are touched, so sizes can be planned without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number


@dataclass(frozen=True)
class Plain:
    """Numbers of a `dtype` of `WIDTHS`, row-major."""

    dtype: str

    def __str__(self) -> str:
        return self.dtype

    def nbytes(self, n: int, k: int) -> tuple[int, ...]:
        """Bytes of [n, k]."""
        return (n * k * WIDTHS[self.dtype],)


@dataclass(frozen=True)
class Format:
    """Integers of `bits` (2, 4 or 8), a scale of `scale_dtype` for each `block_size` neighbours of a row.

    A stored code q stands for (q - z) * scale. Where `symmetric`, z is 2 ** (bits - 1) everywhere; else every block
    has a zero point z of its own, unsigned and as wide as a code. A row [K] is stored as

    1. codes, uint8 [K * bits / 8]: of several codes in a byte the first is in the lowest bits,
    2. scales [K / block_size],
    3. without `symmetric` zeros, uint8 [ceil(K / block_size * bits / 8)], packed like codes and padded with 0.

    That is the layout of com.microsoft.MatMulNBits (inputs B, scales, zero_points), of GatherBlockQuantized (data,
    scales, zero_points) and, a row of a stack of experts being a row, of QMoE (weights, scales, zero_points; inputs 11
    and 12 for fc1 and fc2), as ONNX Runtime's ContribOperators.md has them.
    """

    bits: int
    block_size: int
    scale_dtype: str = "float32"
    symmetric: bool = True

    def __str__(self) -> str:
        return f"{self.dtype}, block {self.block_size}" + ("" if self.symmetric else ", zero points")

    @property
    def dtype(self) -> str:
        """As manifest.json calls the codes."""
        return f"int{self.bits}"

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block_size * self.bits // 8

    def widths(self, k: int) -> tuple[int, ...]:
        """How many numbers of codes, scales and, without `symmetric`, zeros a row of k columns has."""
        blocks = k // self.block_size
        zeros = () if self.symmetric else (-(-blocks * self.bits // 8),)
        return (k * self.bits // 8, blocks, *zeros)

    def nbytes(self, n: int, k: int) -> tuple[int, ...]:
        """Bytes of the codes, the scales and, without `symmetric`, the zeros of [n, k]."""
        codes, scales, *zeros = self.widths(k)
        return (n * codes, n * scales * WIDTHS[self.scale_dtype], *(n * width for width in zeros))

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [..., count], a code a byte -> [..., ceil(count * bits / 8)]."""
        from torch.nn.functional import pad

        each = 8 // self.bits  # codes of a byte
        if each == 1:
            return codes
        parts = pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each)).unbind(-1)
        packed: Tensor = reduce(or_, (part << self.bits * place for place, part in enumerate(parts)))
        return packed

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """What `pack` was given: uint8 [..., count], a code a byte."""
        import torch

        if self.bits < 8:
            shifts = range(0, 8, self.bits)
            packed = torch.stack([packed >> shift & (1 << self.bits) - 1 for shift in shifts], dim=-1).flatten(-2)
        codes: Tensor = packed[..., :count]
        return codes

    def dequantize(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """The float32 rows [..., K] that the three parts of a stored weight stand for."""
        blocks = scales.shape[-1]
        values = self.unpack(codes, blocks * self.block_size).float().unflatten(-1, (blocks, self.block_size))
        middle = 1 << (self.bits - 1) if zeros is None else self.unpack(zeros, blocks).float().unsqueeze(-1)
        rows: Tensor = ((values - middle) * scales.float().unsqueeze(-1)).flatten(-2)
        return rows
