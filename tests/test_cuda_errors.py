"""onnxruntime-gpu on a machine without a card: what is missing is named, and nothing goes on with the CPU. `nox -s
onnxruntime_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from phimoe_onnx.errors import DeviceError
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.runtime.ort import driver, session

if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    pytest.skip("needs onnxruntime-gpu", allow_module_level=True)
if driver.driver_problem() is None:
    pytest.skip("there is a card here", allow_module_level=True)

Bundle = Callable[..., Path]


def test_the_driver_is_named(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        DeviceError, match=r"could not start its CUDAExecutionProvider: there is no NVIDIA driver \(libcuda\.so\.1\)"
    ):
        PhiMoE.load(bundle("longrope", "cuda", "none"), device="cuda")
    assert capfd.readouterr() == ("", "")


def test_a_library_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "driver_problem", lambda: None)
    with pytest.raises(DeviceError, match=r"the library lib\w+\.so\S* is missing; pip install 'phimoe-onnx\[gpu\]'"):
        PhiMoE.load(bundle("longrope", "cuda", "none"), device="cuda")
