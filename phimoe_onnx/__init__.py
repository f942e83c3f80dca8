"""phimoe-onnx: PhiMoE checkpoints to ONNX bundles, and a runtime for them.

`export` and `verify` need the extra `[export]`, `PhiMoE` and `verify_golden` need an ONNX Runtime, `[cpu]` or `[gpu]`;
each is imported when it is first used.
"""

from __future__ import annotations

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
    MissingPackageError,
    OutOfMemoryError,
    PhiMoEError,
)

if TYPE_CHECKING:
    from phimoe_onnx.exporter.pipeline import export
    from phimoe_onnx.parity.verify import verify
    from phimoe_onnx.parity.verify_golden import verify_golden
    from phimoe_onnx.runtime.model import PhiMoE

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "EngineFullError",
    "ExportError",
    "GenerationError",
    "MissingPackageError",
    "OutOfMemoryError",
    "PhiMoE",
    "PhiMoEError",
    "__version__",
    "export",
    "verify",
    "verify_golden",
]

_LAZY = {
    "export": "phimoe_onnx.exporter.pipeline",
    "verify": "phimoe_onnx.parity.verify",
    "verify_golden": "phimoe_onnx.parity.verify_golden",
    "PhiMoE": "phimoe_onnx.runtime.model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'phimoe_onnx' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        extra = "cpu" if name in ("PhiMoE", "verify_golden") or error.name == "onnxruntime" else "export"
        raise MissingPackageError(
            f"{name} needs the package {error.name}; pip install 'phimoe-onnx[{extra}]'"
        ) from None
