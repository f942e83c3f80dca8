"""Room for large arrays: in memory, and on disk past a bound."""

from __future__ import annotations

import math
import os
import tempfile

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.errors import PhiMoEError

LIMIT = 2 << 30  # bytes


class Scratch:
    """Gives out float32 arrays: in memory while they are `limit` bytes together, later ones in files of the folder for
    temporary files (TMPDIR). These files have no names, and vanish with their arrays.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._left = limit

    def empty(self, *shape: int) -> NDArray[np.float32]:
        """An array whose numbers may be anything.

        Raises:
            PhiMoEError: the disk has no room for it.
        """
        nbytes = 4 * math.prod(shape)
        if nbytes <= self._left:
            self._left -= nbytes
            return np.empty(shape, np.float32)
        try:
            with tempfile.TemporaryFile() as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk would end the process when the array is filled
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                return np.memmap(file, np.float32, "w+", shape=shape)
        except OSError as error:
            raise PhiMoEError(
                f"{tempfile.gettempdir()}: has no room for {nbytes / 1e9:.2f} GB of intermediate results "
                f"({error.strerror}); set TMPDIR to a folder that has"
            ) from None
