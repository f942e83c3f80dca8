"""Our own operators for ONNX Runtime: a library beside this file, if there was cargo when the package was installed."""

from __future__ import annotations

import sysconfig
from pathlib import Path

REQUIREMENT = "phimoe.native.1"  # what a graph with these operators says in the manifest's `requires`


def library() -> Path | None:
    """The library of the operators, or None where it was not built."""
    path = Path(__file__).with_name(f"_operators{sysconfig.get_config_var('EXT_SUFFIX')}")
    return path if path.is_file() else None
