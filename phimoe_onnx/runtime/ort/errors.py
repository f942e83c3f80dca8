"""Out of memory, in words: ONNX Runtime says it in the text of its general errors only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from phimoe_onnx.errors import OutOfMemoryError

_TEXTS = re.compile(
    r"(?:Failed to allocate memory for requested buffer of size|smaller than requested bytes of) (?P<size>\d+)"
    r"|out of memory|bad_alloc",
    re.IGNORECASE,
)


@contextmanager
def memory_errors(what: str, needed: int) -> Iterator[None]:
    """Turns an error about memory into an OutOfMemoryError that names `what` was done and the bytes `needed` for all of
    it.

    Raises:
        OutOfMemoryError: in place of a MemoryError, or of ONNX Runtime's errors whose texts are about memory.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base below this
        found = _TEXTS.search(str(error))
        if not found and not isinstance(error, MemoryError):
            raise
        last = (
            f", and the last {gigabytes(int(found['size']))} of it were not to be had"
            if found and found["size"]
            else ""
        )
        raise OutOfMemoryError(f"{what}: out of memory; it needs {gigabytes(needed)}{last}; {REMEDY}") from error


REMEDY = "free some, take a smaller batch or a shorter context, or export with int4 weights or an int8 cache"


def gigabytes(size: int) -> str:
    """Bytes as GB to two digits, or as MB if they are few."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
