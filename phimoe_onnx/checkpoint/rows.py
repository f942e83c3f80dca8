"""Some rows of a checkpoint's tensor, which are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rows:
    """Some rows of a checkpoint's tensor, [rows, ...]; `read` loads them, in the dtype in which they are stored."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
