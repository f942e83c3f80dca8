"""Round to nearest, block by block, in the layout that MatMulNBits, QMoE and GatherBlockQuantized share."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from phimoe_onnx.checkpoint.tensors import Rows
from phimoe_onnx.exporter.weights import FLOATS, Job, Parameter, Piece, Weight

SLAB = (
    1 << 19
)  # weights that are quantised at once: few enough for a core's cache, enough for threads not to queue for the GIL
ROUND = 3.0 * (
    1 << 22
)  # added to a float32 it leaves no bits for a fraction, so the low ones are those of the nearest integer


@dataclass(frozen=True)
class Format:
    """Symmetric integers of `bits` (4 or 8), one scale of `dtype` for each `block_size` neighbours of a row.

    A stored code q stands for (q - 2 ** (bits - 1)) * scale. Of two 4-bit codes in a byte the first is in the low
    nibble (com.microsoft.MatMulNBits in ONNX Runtime's ContribOperators.md).
    """

    bits: int
    block_size: int
    dtype: ir.DataType = ir.DataType.FLOAT

    def __str__(self) -> str:
        return f"int{self.bits}, block {self.block_size}"

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block_size * self.bits // 8

    def attributes(self, n: int, blocks: int) -> dict[str, int]:
        """MatMulNBits' attributes for n rows of so many blocks; activations are rounded to int8 as well (accuracy_level
        4).
        """
        return {
            "N": n,
            "K": blocks * self.block_size,
            "bits": self.bits,
            "block_size": self.block_size,
            "accuracy_level": 4,
        }

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [..., N, K] -> codes uint8 [..., N, K * bits / 8] and scales [..., N, K / block_size].

        The scale is signed, so that the block's largest magnitude falls on the lowest code, whose magnitude is one step
        larger than the highest's: all 2 ** bits codes are used. Values are off by half a step at most, but for those
        within half a step of the largest magnitude with the other sign, which are clipped to one step less.
        """
        *outer, k = weight.shape
        rows = weight.reshape(-1, k)
        codes = torch.empty(len(rows), k * self.bits // 8, dtype=torch.uint8)
        scales = torch.empty(len(rows), k // self.block_size, dtype=FLOATS[self.dtype])
        step = max(1, SLAB // k)
        for slab in (slice(start, start + step) for start in range(0, len(rows), step)):
            self._quantize_slab(rows[slab], codes[slab], scales[slab])
        return codes.view(*outer, -1), scales.view(*outer, -1)

    def _quantize_slab(self, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Fills `codes` and `scales` for some rows."""
        blocks = rows.to(torch.float32, copy=True).unflatten(-1, (-1, self.block_size))
        low, high = blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
        zero = 1 << (self.bits - 1)
        scales.copy_((torch.where(-low > high, low, high) / -zero).squeeze(-1))
        scale = scales.float().unsqueeze(-1)
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        rounded = blocks.mul_(inverse).clamp_(-zero, zero - 1).add_(ROUND + zero)
        wide = rounded.view(torch.int32).to(torch.uint8).flatten(-2)
        if self.bits == 4:  # two codes as one little-endian int16, 0x0b0a, whose low byte becomes 0xba
            pairs = wide.view(torch.int16)
            wide = pairs.bitwise_or(pairs >> 4)
        codes.copy_(wide)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The float32 rows [N, K] that `quantize`'s result stands for."""
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        blocks = codes.float().unflatten(-1, (-1, self.block_size)) - (1 << (self.bits - 1))
        rows: torch.Tensor = (blocks * scales.float().unsqueeze(-1)).flatten(-2)
        return rows

    def codes_and_scales(self, parameter: Parameter, name: str) -> tuple[Weight, Weight]:
        """The parameter [..., N, K] as two weights, [..., N, K * bits / 8] and [..., N, K / block_size], a job for each
        of its rows.
        """
        jobs = [self.job(rows) for rows in parameter.rows]
        return self.weights(name, jobs, parameter.shape.numpy())

    def job(self, rows: Rows) -> Job:
        """Reads and quantises some rows [N, K]."""
        return Job(lambda: self.quantize(rows.read()), self.nbytes(*rows.shape))

    def nbytes(self, n: int, k: int) -> tuple[int, int]:
        """Bytes of the codes and of the scales of [n, k]."""
        return n * k * self.bits // 8, n * k // self.block_size * FLOATS[self.dtype].itemsize

    def weights(self, name: str, jobs: list[Job], shape: tuple[int, ...]) -> tuple[Weight, Weight]:
        """Codes and scales of a matrix or a stack of matrices of `shape`, from jobs that give both."""
        *outer, k = shape
        codes = Weight(
            f"{name}.codes", ir.DataType.UINT8, (*outer, k * self.bits // 8), [Piece(job, 0) for job in jobs]
        )
        scales = Weight(f"{name}.scales", self.dtype, (*outer, k // self.block_size), [Piece(job, 1) for job in jobs])
        return codes, scales
