"""ONNX Runtime's errors in our words: out of memory, which only their texts say, and graphs that cannot be run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import onnxruntime as ort

from phimoe_onnx.errors import BundleError, OutOfMemoryError, PhiMoEError

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


@contextmanager
def run_errors(what: str, needed: int) -> Iterator[None]:
    """As `memory_errors`, and whatever else ONNX Runtime says of a run becomes an error about the graph.

    Raises:
        OutOfMemoryError: see `memory_errors`.
        BundleError: the graph cannot be run.
    """
    try:
        with memory_errors(what, needed):
            yield
    except PhiMoEError:
        raise
    except Exception as error:
        raise BundleError(
            f"{what}: ONNX Runtime {ort.__version__} cannot run the bundle's graph: {str(error)[:400]}; "
            f"copy or export the bundle again"
        ) from error


REMEDY = "free some, take a smaller batch or a shorter context, or export with int4 weights or an int8 cache"


def gigabytes(size: int) -> str:
    """Bytes as GB to two digits, or as MB if they are few."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
