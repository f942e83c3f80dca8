"""Our own library, which is there if there was cargo when the package was installed: operators for ONNX Runtime, and
the rounding of weights.
"""

from __future__ import annotations

import ctypes
import sysconfig
from pathlib import Path


def library() -> Path | None:
    """The library's file, or None where it was not built."""
    path = Path(__file__).parent / "runtime" / "ort" / f"_operators{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.is_file() else None


def kernels() -> str | None:
    """The kernels that the library uses in this process, "avx2" for example; None without a library.

    The best ones for the processor, or those that the environment variable PHIMOE_KERNELS named when they were first
    used. If it names none that can run here, the text says so, as does every session with these operators.
    """
    path = library()
    if path is None:
        return None
    name = ctypes.CDLL(str(path)).phimoe_native_kernels
    name.restype = ctypes.c_char_p
    return str(name().decode())
