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
@pytest.mark.parametrize(("name", "let_go"), [("model.scales.data", True), ("model.data", False)])
def test_only_scales_are_let_go_and_come_back_unchanged(tmp_path: Path, name: str, let_go: bool) -> None:
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
    for _ in range(50):  # several times, as the system may pass over pages that it is about to put on its lists
        with released(tmp_path):
            assert mapped[:] == content
        if _resident(path) == (0 if let_go else SIZE):
            break
    assert _resident(path) == (0 if let_go else SIZE)
    assert mapped[:] == content


def _resident(path: Path) -> int:
    """Bytes of this process's mapping of `path` that are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(str(path)))
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))
