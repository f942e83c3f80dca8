"""phimoe-onnx: PhiMoE checkpoints to ONNX bundles, and a runtime for them.

`export`, `convert` and `verify` need the extra `[export]`; `PhiMoE`, what it returns and `verify_golden` need an ONNX
Runtime, `[cpu]` or `[gpu]`. Each is imported when it is first used.

Importing this package, or a part of it, turns ONNX Runtime's telemetry off for the process, where ONNX Runtime is not
loaded already: it sets ORT_DISABLE_TELEMETRY=1 in the environment. A value that is there stays, so that 0 turns it on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from phimoe_onnx._version import __version__
from phimoe_onnx.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineFullError,
    ExportError,
    GenerationError,
    GoldenError,
    MissingPackageError,
    OutOfMemoryError,
    PhiMoEError,
)

if TYPE_CHECKING:
    from phimoe_onnx.exporter.convert import convert
    from phimoe_onnx.exporter.pipeline import export
    from phimoe_onnx.parity.verify import verify
    from phimoe_onnx.parity.verify_golden import verify_golden
    from phimoe_onnx.runtime.model import PhiMoE, Score
    from phimoe_onnx.runtime.request import Options
    from phimoe_onnx.runtime.row import Generation, Piece

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "EngineFullError",
    "ExportError",
    "Generation",
    "GenerationError",
    "GoldenError",
    "MissingPackageError",
    "Options",
    "OutOfMemoryError",
    "PhiMoE",
    "PhiMoEError",
    "Piece",
    "Score",
    "__version__",
    "convert",
    "export",
    "verify",
    "verify_golden",
]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # in the process's own environment, before its library is loaded

_RUNTIME = "phimoe_onnx.runtime"
_LAZY = {
    "convert": "phimoe_onnx.exporter.convert",
    "export": "phimoe_onnx.exporter.pipeline",
    "verify": "phimoe_onnx.parity.verify",
    "verify_golden": "phimoe_onnx.parity.verify_golden",
    "Generation": _RUNTIME,
    "Options": _RUNTIME,
    "PhiMoE": _RUNTIME,
    "Piece": _RUNTIME,
    "Score": _RUNTIME,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'phimoe_onnx' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        runtime = _LAZY[name] == _RUNTIME or name == "verify_golden"
        extra = "cpu" if runtime or error.name == "onnxruntime" else "export"
        raise MissingPackageError(
            f"{name} needs the package {error.name}; pip install 'phimoe-onnx[{extra}]'"
        ) from None
