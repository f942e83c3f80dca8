"""Letting go of mapped pages while a graph is loaded."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phimoe_onnx.runtime.ort.mapped import released

SIZE = 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("name", "resident"), [("model.scales.data", 0), ("model.data", SIZE)])
def test_only_scales_are_let_go_and_come_back_unchanged(tmp_path: Path, name: str, resident: int) -> None:
    if (
        subprocess.run(["stat", "-fc", "%T", tmp_path], capture_output=True, text=True, check=True).stdout.strip()
        == "tmpfs"
    ):
        pytest.skip("files of a tmpfs have no other place than memory")
    content = os.urandom(SIZE)
    path = tmp_path / name
    path.write_bytes(content)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        mapped = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
    with released(tmp_path):
        assert mapped[:] == content
    assert _resident(path) == resident
    assert mapped[:] == content


def _resident(path: Path) -> int:
    """Bytes of this process's mapping of `path` that are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(str(path)))
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))
