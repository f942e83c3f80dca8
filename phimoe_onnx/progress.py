"""How an export says where it is."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

# a phase, and where it is behind a colon where there is more to say; the bytes done and the bytes to do
Progress = Callable[[str, int, int], None]


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
