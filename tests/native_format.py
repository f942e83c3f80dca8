"""native/FORMAT.md in numpy: the oracle of the operators' tests, written from that text alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVELS = {
    2: np.array([-7, -2, 2, 7]),
    3: np.array([-8, -5, -3, -1, 1, 3, 5, 8]),
    4: np.arange(16) - 8,
    8: np.arange(256).astype(np.uint8).view(np.int8).astype(int),
}
F32 = np.float32


def fma(a: NDArray[F32], b: NDArray[F32], c: NDArray[F32]) -> NDArray[F32]:
    """float32 a * b + c, rounded once (but for ties of the longer float, which the tests' numbers do not meet)."""
    return (a.astype(np.longdouble) * b + c).astype(F32)


@dataclass
class Matrix:
    """W [N, K] as codes uint8 [N, K], s uint8 [N, K' / 32] and S, bfloat16 as float32 [N, K' / G]."""

    bits: int
    codes: NDArray[np.uint8]
    block_scales: NDArray[np.uint8]
    superblock_scales: NDArray[F32]

    @property
    def superblock_size(self) -> int:
        """G."""
        return _padded(self.codes.shape[1]) // self.superblock_scales.shape[1]

    def integers(self) -> NDArray[np.int64]:
        """s * level [N, K']."""
        outputs, inputs = self.codes.shape
        levels = np.zeros((outputs, _padded(inputs)), np.int64)
        levels[:, :inputs] = LEVELS[self.bits][self.codes]
        return levels if self.bits == 8 else levels * self.block_scales.repeat(32, axis=1)

    def values(self) -> NDArray[np.float64]:
        """W [N, K]."""
        scales = self.superblock_scales.astype(float).repeat(self.superblock_size, axis=1)
        return (scales * self.integers())[:, : self.codes.shape[1]]

    def multiply(self, x: NDArray[F32]) -> NDArray[F32]:
        """x [R, K] -> y [R, N], to the last bit."""
        q, a = quantise(x, self.superblock_size)
        groups = q.shape[1] // self.superblock_size
        weights = self.integers().reshape(len(self.codes), groups, -1)
        sums = np.einsum("rgk,ngk->rng", q.reshape(len(x), groups, -1), weights).astype(F32)
        y = np.zeros((len(x), len(self.codes)), F32)
        for g in range(groups):
            y = fma(sums[:, :, g], self.superblock_scales[:, g] * a[:, g, None], y)
        return y

    def strips(self) -> NDArray[np.uint8]:
        """The bytes [strips, strip bytes]."""
        outputs, inputs = self.codes.shape
        strips, tiles = -(-outputs // 16), _padded(inputs) // 64
        zero = 8 if self.bits == 4 else 0
        codes = np.full((strips * 16, tiles * 64), zero, np.uint8)
        codes[:outputs, :inputs] = self.codes
        wide = codes.reshape(strips, 16, tiles, 64).transpose(0, 2, 3, 1)  # [strip, tile, k, output]
        big = np.zeros((strips * 16, self.superblock_scales.shape[1]), F32)
        big[:outputs] = self.superblock_scales
        parts = [_bytes(big.reshape(strips, 16, -1).transpose(0, 2, 1))]
        if self.bits < 8:
            small = np.zeros((strips * 16, tiles * 2), np.uint8)
            small[:outputs] = self.block_scales
            pairs = small.reshape(strips, 16, tiles, 2).transpose(0, 2, 1, 3)
            parts.append((pairs[..., 0] | pairs[..., 1] << 4).reshape(strips, -1))
        head = np.concatenate(parts, axis=1)
        head = np.pad(head, ((0, 0), (0, -head.shape[1] % 64)))
        return np.ascontiguousarray(np.concatenate([head, _tiles(wide, self.bits)], axis=1))


def _tiles(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[strip, tile, k, output] -> the tiles' bytes."""
    if bits == 3:
        low, high = _tiles_of(codes & 3, 2), _tiles_of(codes >> 2, 1)
        return np.concatenate([low, high], axis=2).reshape(len(codes), -1)
    return _tiles_of(codes, bits).reshape(len(codes), -1)


def _tiles_of(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes that divide a byte: input (64 / n) i + 4 r + j in bits i * bits of byte [r][output][j], n codes a byte."""
    count = 8 // bits
    strips, tiles, _, outputs = codes.shape
    split = codes.reshape(strips, tiles, count, 16 // count, 4, outputs)  # [..., i, r, j, output]
    shifts = (np.arange(count, dtype=np.uint8) * bits)[:, None, None, None]
    merged = np.bitwise_or.reduce(split << shifts, axis=2)
    return merged.transpose(0, 1, 2, 4, 3).reshape(strips, tiles, -1)


def _bytes(bfloat16: NDArray[F32]) -> NDArray[np.uint8]:
    high = (np.ascontiguousarray(bfloat16).view(np.uint32) >> 16).astype("<u2")
    return high.view(np.uint8).reshape(len(bfloat16), -1)


def _padded(inputs: int) -> int:
    return -(-inputs // 64) * 64


def quantise(x: NDArray[F32], superblock_size: int) -> tuple[NDArray[np.int64], NDArray[F32]]:
    """Rows x [R, K] -> q [R, K'] and a [R, K' / G]."""
    padded = np.zeros((len(x), _padded(x.shape[1])), F32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), -1, superblock_size)
    m = np.abs(blocks).max(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.clip(np.rint(blocks * (F32(127) / m)[:, :, None]), -127, 127)
    finite = np.isfinite(blocks).all(axis=2)
    q[(m == 0) | ~finite] = 0
    return q.astype(np.int64).reshape(len(x), -1), np.where(finite, m / F32(127), F32("nan")).astype(F32)


def random_matrix(rng: np.random.Generator, bits: int, outputs: int, inputs: int, superblock_size: int) -> Matrix:
    """Any codes and scales, about as large as a layer's weights."""
    padded = _padded(inputs)
    codes = rng.integers(0, 2**bits, (outputs, inputs), np.uint8)
    codes[codes == 128] = 0  # the signed byte that the format does not have; no code of fewer bits
    block_scales = rng.integers(0, 16, (outputs, padded // 32), np.uint8)
    block_scales[:, -(-inputs // 32) :] = 0
    big = rng.uniform(0.5, 1.5, (outputs, padded // superblock_size)) / (60 * np.sqrt(inputs))
    big = (big.astype(F32).view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)
    return Matrix(bits, codes, block_scales, big)


def sparse_mixer(scores: NDArray[F32], jitter: float) -> tuple[list[int], list[float]]:
    """The two experts of a token and their weights."""
    chosen: list[int] = []
    weights = []
    for _ in range(2):
        rest = [j for j in range(len(scores)) if j not in chosen]
        i = max(rest, key=lambda j: (scores[j], -j))
        m = scores[i]
        with np.errstate(invalid="ignore"):
            near = [j for j in rest if not (scores[j] - m) / max(abs(scores[j]), m) < -2 * jitter]
        weights.append(float(1 / sum(np.exp(float(scores[j] - m)) for j in near)))
        chosen.append(i)
    return chosen, weights


def expert_bytes(gate: Matrix, up: Matrix, down: Matrix) -> NDArray[np.uint8]:
    """Gate and up strip by strip, then down."""
    return np.concatenate([np.stack([gate.strips(), up.strips()], axis=1).ravel(), down.strips().ravel()])


def mixture(
    x: NDArray[F32], router: NDArray[F32], experts: list[tuple[Matrix, Matrix, Matrix]], jitter: float
) -> NDArray[np.float64]:
    """The layer's output [R, H]; exp in double precision, so not to the last bit."""
    y = np.zeros(x.shape)
    for r, row in enumerate(x):
        chosen, weights = sparse_mixer((router.astype(float) @ row).astype(F32), jitter)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up, down = experts[expert]
            g = gate.multiply(row[None]).astype(float)
            h = (g / (1 + np.exp(-g)) * up.multiply(row[None])).astype(F32)
            y[r] += weight * down.multiply(h)[0].astype(float)
    return y
