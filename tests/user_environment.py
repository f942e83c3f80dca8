"""The environment of a user's shell, for tests of what a process leaves in a home."""

from __future__ import annotations

import os
from pathlib import Path

KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMPDIR")


def user_environment(home: Path | None, telemetry: str | None = None) -> dict[str, str]:
    """A few variables of this process, and no CI, GITHUB_ACTIONS or the like: where one of those is set ONNX Runtime
    keeps its telemetry off by itself, and a test would show nothing.
    """
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    if home is not None:
        environment["HOME"] = str(home)
    if telemetry is not None:
        environment["ORT_DISABLE_TELEMETRY"] = telemetry
    return environment
