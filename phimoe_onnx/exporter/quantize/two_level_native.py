"""two_level.py's rounding as the library of the native operators does it: the same bytes, many times faster.

A call leaves the GIL to other threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from phimoe_onnx import operators
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.strips import BLOCK, STRIP, Strips

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as the library counts them
DONE, NOT_FINITE, NO_KERNELS = 0, 1, 2  # what it answers

# (weights, dtype, rows, columns, bits, codes, scales or None) -> an answer
Function = Callable[[int, int, int, int, int, int, "int | None"], int]


@cache
def function() -> Function | None:
    """The library's; None where it was not built, or is older than this."""
    path = operators.library()
    found = None if path is None else getattr(ctypes.CDLL(str(path)), "phimoe_native_round", None)
    if found is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        found.argtypes = [pointer, ctypes.c_uint32, size, size, ctypes.c_uint32, pointer, pointer]
        found.restype = ctypes.c_int32
    return found


def rounded(run: Function, rows: Tensor, form: Format | Strips) -> tuple[Tensor, ...] | None:
    """Rows [N, K] -> strips, or codes and the float32 scales of blocks of 32; None where a number is not finite.

    Raises:
        ExportError: the environment names kernels that cannot run here.
    """
    n, k = rows.shape
    rows = (rows if rows.dtype in DTYPES else rows.float()).contiguous()
    if rows.data_ptr() % rows.itemsize:
        rows = rows.clone()
    stored: tuple[Tensor, ...]
    if isinstance(form, Strips):
        stored = (torch.empty(-(-n // STRIP), form.strip_bytes(k), dtype=torch.uint8),)
    else:
        stored = (torch.empty(n, k * form.bits // 8, dtype=torch.uint8), torch.empty(n, -(-k // BLOCK)))
    scales = stored[1].data_ptr() if len(stored) > 1 else None
    answer = run(rows.data_ptr(), DTYPES[rows.dtype], n, k, form.bits, stored[0].data_ptr(), scales)
    if answer == NO_KERNELS:
        raise ExportError(str(operators.kernels()))
    if answer not in (DONE, NOT_FINITE):
        raise ExportError(f"the native operators' library does not round [{n}, {k}] to {form}; please report it")
    return stored if answer == DONE else None
