"""How much memory this process took at its peak, as far as the system says."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int | None:
    """Bytes that were resident at the most; None where neither the system nor psutil says."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak is at least that of the process that started this one
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    try:
        import resource  # POSIX alone has it
    except ModuleNotFoundError:
        return _peak_working_set()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_working_set() -> int | None:
    """As Windows calls it."""
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    peak: int | None = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return peak
