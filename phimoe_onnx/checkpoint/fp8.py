"""FP8 weights: codes with the scales that make numbers of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"F8_E4M3": 1, "F8_E5M2": 1}  # bytes


def scales_shape(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int] | None:
    """How many rows and columns of a matrix of `shape` [..., N, K] share one of its scales.

    Known are one scale for all, one for each row, and one for each `block`; None for anything else. A stack
    [E, N, K] has one for all, or those of each of its matrices.
    """
    *outer, n, k = shape
    own = tuple(outer)
    if scales in {(), (1,), (*own, 1, 1), own}:
        return n, k
    if scales in {(*own, n), (*own, n, 1)}:
        return 1, k
    blocks = (-(-n // block[0]), -(-k // block[1]))
    return block if scales == (*own, *blocks) else None


def numbers(codes: torch.Tensor, scales: torch.Tensor, shared: tuple[int, int], first: int = 0) -> torch.Tensor:
    """The numbers of FP8 codes [N, K], float32: each code times its scale.

    Args:
        codes: some rows of a matrix, from `first` on.
        scales: of the whole matrix, in any shape that `scales_shape` knows.
        shared: what that says.
        first: the number of the first row.
    """
    import torch  # only here: what the headers say is read without it

    n, k = codes.shape
    rows, columns = (first + torch.arange(n)) // shared[0], torch.arange(k) // shared[1]
    grid = scales.float().reshape(-1, int(columns[-1]) + 1)
    return codes.float() * grid[rows][:, columns]
