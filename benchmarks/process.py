"""Runs a command and watches the memory of its process tree."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

INTERVAL = 0.02  # seconds


def measure(command: Sequence[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes of the process and all its children together, and what it printed."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(INTERVAL)
    seconds = time.monotonic() - start
    assert process.stdout
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: ended with {process.returncode}")
    return seconds, peak, output


def _resident(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total
