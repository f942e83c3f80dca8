"""Our own operators for ONNX Runtime: a library beside this file, if there was cargo when the package was installed."""

from __future__ import annotations

import ctypes
import sysconfig
from pathlib import Path


def library() -> Path | None:
    """The library of the operators, or None where it was not built."""
    path = Path(__file__).with_name(f"_operators{sysconfig.get_config_var('EXT_SUFFIX')}")
    return path if path.is_file() else None


def kernels() -> str | None:
    """The kernels that the operators use in this process, "avx2" for example; None without a library.

    The best ones for the processor, or those that the environment variable PHIMOE_KERNELS named when they were first
    used. If it names none that can run here, the text says so, as does every session with these operators.
    """
    path = library()
    if path is None:
        return None
    name = ctypes.CDLL(str(path)).phimoe_native_kernels
    name.restype = ctypes.c_char_p
    return str(name().decode())
