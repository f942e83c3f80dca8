"""What each weight is multiplied with while PyTorch runs, and how far other weights' products are from its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from phimoe_onnx.layered import Read

ROWS = 256  # of what a matrix is multiplied with, at the most, that errors are measured on

# A weight's name in modeling.py, its expert, the matrix [N, K] itself and what it is multiplied with, [rows, K].
Look = Callable[[str, int | None, Tensor, Tensor], None]


class Products(TorchFunctionMode):
    """While it is entered, `look` is shown each product of the weights that its `read` hands out.

    A weight is known by where its numbers lie, so it must be multiplied as it was read: layered.py does so.
    """

    def __init__(self, read: Read, look: Look) -> None:
        super().__init__()
        self._read, self._look = read, look
        self._names: dict[int, tuple[str, int | None]] = {}

    def read(self, name: str, expert: int | None) -> Tensor:
        """The weight, which is watched from now on."""
        weight = self._read(name, expert)
        self._names[weight.data_ptr()] = (name, expert)
        return weight

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[1].data_ptr() in self._names:
            self._look(*self._names[args[1].data_ptr()], args[1], args[0].flatten(0, -2))
        return func(*args, **(kwargs or {}))


class Errors:
    """How far the products of the weights that `stored` reads are from those of the weights that are looked at.

    Of each matrix up to `ROWS` inputs count. With W' for W the error is the square root of the sum of |(W' - W) x|^2
    by that of |W x|^2, over the inputs x of all matrices that share a name: the experts of a stack have one figure.
    Only weights in `names` count.
    """

    def __init__(self, stored: Read, names: Container[str]) -> None:
        self._names = names
        self._stored = lru_cache(maxsize=4)(stored)  # Q, K, V and O of a layer are read in turns
        self._rows: Counter[tuple[str, int | None]] = Counter()
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def look(self, name: str, expert: int | None, weight: Tensor, x: Tensor) -> None:
        """Takes in a product, as `Products` shows it."""
        x = x[: ROWS - self._rows[name, expert]]
        if not len(x) or name not in self._names:
            return
        self._rows[name, expert] += len(x)
        products = F.linear(x, weight)
        difference = F.linear(x, self._stored(name, expert)) - products
        self._sums[name] += torch.stack([difference.double().square().sum(), products.double().square().sum()])

    def by_name(self) -> dict[str, float]:
        """The error of each parameter that was looked at; NaN where its products were all zero."""
        return {name: float((error / size).sqrt()) for name, (error, size) in self._sums.items()}
