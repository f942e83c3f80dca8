"""The layout of weights that the native operators read where they lie; native/FORMAT.md is its contract.

Layout alone, as format.py is for ONNX Runtime's operators; two_level.py rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STRIP = 16  # outputs that lie side by side
TILE = 64  # inputs of a piece of codes
BLOCK = 32  # inputs that share an integer scale
LARGEST_SUPERBLOCK = 512
ALIGNMENT = 64  # bytes
LEVELS = {2: (-7, -2, 2, 7), 3: (-8, -5, -3, -1, 1, 3, 5, 8)}  # by code; 4 and 8 bits have all integers


@dataclass(frozen=True)
class Strips:
    """Codes of `bits` (2, 3, 4 or 8) with two levels of scales, sixteen outputs side by side.

    A weight is S * s * level: S a bfloat16 for each superblock of a row, s an integer from 0 to 15 for each 32 inputs
    (1 with 8 bits), level one of `LEVELS`, or an integer from -8 to 7 (4 bits) or from -127 to 127 (8 bits).
    """

    bits: int

    def __str__(self) -> str:
        return f"{self.dtype} in strips"

    @property
    def dtype(self) -> str:
        """As manifest.json calls the codes."""
        return f"int{self.bits}"

    def strip_bytes(self, k: int) -> int:
        """Bytes of sixteen outputs with k inputs each."""
        tiles = -(-k // TILE)
        return self._header_bytes(k) + tiles * TILE * STRIP * self.bits // 8

    def nbytes(self, n: int, k: int) -> tuple[int, ...]:
        """Bytes of [n, k]."""
        return (-(-n // STRIP) * self.strip_bytes(k),)

    def _header_bytes(self, k: int) -> int:
        tiles = -(-k // TILE)
        superblocks = tiles * TILE // superblock_size(k)
        scales = STRIP * (2 * superblocks + (tiles if self.bits < 8 else 0))
        return -(-scales // ALIGNMENT) * ALIGNMENT

    def pack(self, levels: Tensor, s: Tensor, S: Tensor) -> Tensor:
        """The matrix as its strips, uint8 [strips, strip_bytes].

        Args:
            levels: int8 [n, k].
            s: uint8 [n, k / 32, rounded up], ones with 8 bits.
            S: bfloat16 [n, superblocks].
        """
        import torch
        from torch.nn.functional import pad

        n, k = levels.shape
        strips, tiles = -(-n // STRIP), -(-k // TILE)
        rows = (0, strips * STRIP - n)
        levels = pad(levels, (0, tiles * TILE - k, *rows)).view(strips, STRIP, tiles, TILE // 4, 4)
        codes = self._codes(levels.permute(0, 2, 3, 1, 4))  # [strips, tiles, TILE / 4, STRIP, 4]
        if self.bits == 3:
            tile = torch.cat((_folded(codes & 3, 2), _folded(codes >> 2, 1)), dim=2)
        else:
            tile = _folded(codes, self.bits)
        scales = [pad(S, (0, 0, *rows)).view(strips, STRIP, -1).transpose(1, 2).contiguous().view(torch.uint8)]
        if self.bits < 8:
            pairs = pad(s, (0, 2 * tiles - s.shape[1], *rows)).view(strips, STRIP, tiles, 2)
            scales.append((pairs[..., 0] | pairs[..., 1] << 4).transpose(1, 2))
        header = torch.cat([part.reshape(strips, -1) for part in scales], dim=1)
        header = pad(header, (0, self._header_bytes(k) - header.shape[1]))
        return torch.cat((header, tile.reshape(strips, -1)), dim=1)

    def integers(self, packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `pack` made strips, uint8 [strips, strip_bytes], of: levels [n, k], s and S."""
        import torch

        strips, tiles, header = len(packed), -(-k // TILE), self._header_bytes(k)
        superblocks = tiles * TILE // superblock_size(k)
        outer = packed[:, : 2 * STRIP * superblocks].contiguous().view(torch.bfloat16)
        S = outer.view(strips, superblocks, STRIP).transpose(1, 2).reshape(strips * STRIP, -1)
        if self.bits == 8:
            s = torch.ones(strips * STRIP, 2 * tiles, dtype=torch.uint8)
        else:
            pairs = packed[:, 2 * STRIP * superblocks :][:, : STRIP * tiles].view(strips, tiles, STRIP).transpose(1, 2)
            s = torch.stack((pairs & 15, pairs >> 4), dim=-1).reshape(strips * STRIP, -1)
        tile = packed[:, header:].reshape(strips, tiles, 2 * self.bits, STRIP, 4)
        if self.bits == 3:
            codes = _unfolded(tile[:, :, :4], 2) | _unfolded(tile[:, :, 4:], 1) << 2
        else:
            codes = _unfolded(tile, self.bits)
        levels = self._levels(codes).permute(0, 3, 1, 2, 4).reshape(strips * STRIP, -1)
        return levels[:n, :k], s[:n, : -(-k // BLOCK)], S[:n]

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        """The float32 [n, k] that strips, uint8 [strips, strip_bytes], stand for."""
        from torch.nn.functional import pad

        levels, s, S = self.integers(packed, n, k)
        scales = S.float().repeat_interleave(superblock_size(k) // BLOCK, dim=1)[:, : s.shape[1]] * s.float()
        blocks = pad(levels, (0, -k % BLOCK)).float().view(n, -1, BLOCK)
        return blocks.mul_(scales.unsqueeze(-1)).flatten(1)[:, :k].contiguous()

    def _codes(self, levels: Tensor) -> Tensor:
        """int8 -> uint8; what is no level of 2 and 3 bits, a padding's 0, becomes any."""
        import torch

        if self.bits in LEVELS:
            table = torch.tensor(LEVELS[self.bits], dtype=torch.int8)
            return torch.bucketize(levels.contiguous(), table, out_int32=True).to(torch.uint8)
        return (levels + 8).to(torch.uint8) if self.bits == 4 else levels.contiguous().view(torch.uint8)

    def _levels(self, codes: Tensor) -> Tensor:
        """uint8 -> int8."""
        import torch

        if self.bits in LEVELS:
            return torch.tensor(LEVELS[self.bits], dtype=torch.int8)[codes.int()]
        return codes.to(torch.int8) - 8 if self.bits == 4 else codes.contiguous().view(torch.int8)


def _folded(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2, 4 or 8 bits, uint8 [strips, tiles, TILE / 4, STRIP, 4] -> [strips, tiles, 2 * bits, STRIP, 4]."""
    parts = codes.unflatten(2, (8 // bits, -1)).unbind(2)
    folded: Tensor = reduce(or_, (part << bits * place for place, part in enumerate(parts)))
    return folded


def _unfolded(folded: Tensor, bits: int) -> Tensor:
    """What `_folded` was given."""
    import torch

    return torch.cat([folded >> bits * place & (1 << bits) - 1 for place in range(8 // bits)], dim=2)


def superblock_size(k: int) -> int:
    """How many of k inputs share an S: the largest multiple of 64 up to 512 that divides k, rounded up to tiles."""
    tiles = -(-k // TILE)
    return TILE * max(size for size in range(1, LARGEST_SUPERBLOCK // TILE + 1) if tiles % size == 0)


def expert_bytes(gate_up: Strips, down: Strips, hidden_size: int, intermediate_size: int) -> int:
    """Bytes of an expert: the strips of gate and up in turns, then those of down."""
    pairs = gate_up.nbytes(intermediate_size, hidden_size)[0]
    return 2 * pairs + down.nbytes(hidden_size, intermediate_size)[0]


def pack_expert(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Strips of three matrices, each uint8 [strips, strip_bytes], as one expert, uint8 [expert_bytes]."""
    import torch

    return torch.cat((torch.stack((gate, up), dim=1).flatten(), down.flatten()))


def unpack_expert(
    packed: Tensor, gate_up: Strips, down: Strips, hidden_size: int, intermediate_size: int
) -> tuple[Tensor, Tensor]:
    """gate_up_proj [2 I, H] and down_proj [H, I], float32, of what `pack_expert` made."""
    sizes = hidden_size, intermediate_size
    return unpack_gate_up(packed, gate_up, *sizes), unpack_down(packed, gate_up, down, *sizes)


def unpack_gate_up(packed: Tensor, form: Strips, hidden_size: int, intermediate_size: int) -> Tensor:
    """The first that `unpack_expert` gives, alone."""
    pairs = packed[: 2 * form.nbytes(intermediate_size, hidden_size)[0]]
    turns = pairs.view(-1, 2, form.strip_bytes(hidden_size)).transpose(0, 1).flatten(0, 1)
    both: Tensor = form.unpack(turns, len(turns) * STRIP, hidden_size).unflatten(0, (2, -1))
    return both[:, :intermediate_size].flatten(0, 1)


def unpack_down(packed: Tensor, gate_up: Strips, down: Strips, hidden_size: int, intermediate_size: int) -> Tensor:
    """The second that `unpack_expert` gives, alone."""
    rest = packed[2 * gate_up.nbytes(intermediate_size, hidden_size)[0] :]
    return down.unpack(rest.view(-1, down.strip_bytes(intermediate_size)), hidden_size, intermediate_size)
