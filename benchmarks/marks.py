"""What a process has used from one point to the next: time, processor, disk. Linux alone."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path


def mark() -> tuple[float, float, int]:
    """The clock, and this process's so far: processor seconds and bytes read from a disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return time.perf_counter(), time.process_time(), int(lines["read_bytes"])


def between(marks: list[tuple[float, float, int]]) -> dict[str, list[float]]:
    """Seconds, processor seconds and bytes from each mark to the next."""
    columns = ([b - a for a, b in pairwise(one)] for one in zip(*marks, strict=True))
    return dict(zip(("seconds", "processor", "bytes"), columns, strict=True))
