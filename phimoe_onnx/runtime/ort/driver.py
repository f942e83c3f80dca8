"""Why ONNX Runtime could not start its CUDA provider: it says so on stderr only, and goes on with the CPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

_LIBRARIES = "pip install 'phimoe-onnx[gpu]' brings the libraries of CUDA and cuDNN"
# in a process of its own, since a provider library that does not fit may end the process that loads it
_LOAD = """
import ctypes, os, onnxruntime
onnxruntime.preload_dlls()
folder = os.path.join(os.path.dirname(onnxruntime.__file__), "capi")
ctypes.CDLL(os.path.join(folder, "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(os.path.join(folder, "libonnxruntime_providers_cuda.so"))
"""
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def driver_problem() -> str | None:
    """Why no CUDA program can run here, in words, and what to do; None if one can."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1); install it, or use device='cpu'"
    error = driver.cuInit(0)
    if error == _NO_DEVICE:
        return "the NVIDIA driver finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device='cpu'"
    return (
        f"the NVIDIA driver does not start (cuInit gives error {error}); check nvidia-smi, or use device='cpu'"
        if error
        else None
    )


def library_problem() -> str:
    """Which library keeps ONNX Runtime's CUDA provider from loading, in words, and what to do."""
    loaded = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, check=False)
    if missing := re.search(r"(lib\S+\.so\S*): cannot open shared object file", loaded.stderr):
        return f"the library {missing[1]} is missing; {_LIBRARIES}"
    said = loaded.stderr.strip().splitlines()[-1:] or ["its provider library loads, so see its own message on stderr"]
    return f"{said[0]}; {_LIBRARIES}"
