"""How an export says where it is."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

Progress = Callable[[str, int, int], None]  # a phase, the bytes done and the bytes to do


def counter(report: Progress, phase: str, total: int) -> Callable[[int], None]:
    """Counts bytes, from any thread, into reports of `phase`."""
    done = 0
    lock = Lock()

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            report(phase, min(done, total), total)

    return advance
