"""ONNX Runtime's telemetry: off in every program of ours and in the package, unless the user turns it on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_bundle import write_bundle
from tests.user_environment import user_environment

VARIABLE = "ORT_DISABLE_TELEMETRY"
PROGRAMS = ("generate", "chat", "classify", "bench", "verify", "export")
LOADS = """
import sys, time
import phimoe_onnx
phimoe_onnx.PhiMoE.load(sys.argv[1], threads=1).generate("a", max_new_tokens=1)
time.sleep(0.5)  # its files are written in the background
"""
WAITS = """
from pathlib import Path
for _ in range(3000):
    if list(Path.home().rglob("deviceid")):
        break
    time.sleep(0.1)
"""


def run(home: Path | None, code: str, *arguments: str, telemetry: str | None = None) -> str:
    """What a process says on stderr, in a fresh home."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=user_environment(home, telemetry))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_load_writes_nothing_in_the_users_home(bundle: Path, home: Path) -> None:
    run(home, LOADS, str(bundle))
    assert list(home.rglob("*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="where it writes elsewhere is not known")
def test_the_switch_leaves_it_on(bundle: Path, home: Path) -> None:
    run(home, LOADS + WAITS, str(bundle), telemetry="0")
    assert [path.name for path in home.rglob("deviceid")] == ["deviceid"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_turns_it_off_before_onnxruntime_is_loaded(home: Path, program: str) -> None:
    code = f"""
import os, sys
import phimoe_onnx.cli.{program}
assert os.environ[{VARIABLE!r}] == "1"
assert "onnxruntime" not in sys.modules
import onnxruntime, time
time.sleep(0.5)
"""
    run(home, code)
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("there", [False, True])
def test_without_a_home_there_is_no_warning(bundle: Path, there: bool) -> None:
    assert run(Path("/proc/no-home") if there else None, LOADS, str(bundle)) == ""
