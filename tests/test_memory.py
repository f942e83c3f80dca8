"""Errors about memory have a type and a number, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx.errors import BundleError, DeviceError, OutOfMemoryError
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.runtime.ort.errors import memory_errors, run_errors

# As ONNX Runtime 1.31 words them: its arena, the same under gpu_mem_limit, and CUDA.
TEXTS = {
    "bfc_arena.cc:360 AllocateRawInternal Failed to allocate memory for requested buffer of size 2500000000": (
        "2.50 GB of it were not"
    ),
    "Available memory of 1024 is smaller than requested bytes of 4096000": "4.10 MB of it were not",
    "CUDA failure 2: out of memory ; GPU=0": "needs 5.00 GB; free some",
}


@pytest.mark.parametrize("text", TEXTS)
def test_onnxruntimes_texts_become_a_type(text: str) -> None:
    with pytest.raises(OutOfMemoryError, match=TEXTS[text]) as caught, memory_errors("loading x", 5 * 10**9):
        raise RuntimeError(text)
    assert str(caught.value).startswith("loading x: out of memory; it needs 5.00 GB")
    assert isinstance(caught.value, MemoryError)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="no kernel") as caught, memory_errors("loading x", 1):
        raise RuntimeError("no kernel")
    assert not isinstance(caught.value, OutOfMemoryError)


def test_what_onnxruntime_says_of_a_run_is_an_error_of_the_bundle() -> None:
    said = "a step: ONNX Runtime [0-9.]+ cannot run the bundle's graph: no kernel"
    with pytest.raises(BundleError, match=said), run_errors("a step", 1):
        raise RuntimeError("no kernel")
    with pytest.raises(OutOfMemoryError), run_errors("a step", 1):
        raise RuntimeError("bad_alloc")


def test_a_cache_larger_than_any_memory(bundle: Callable[..., Path]) -> None:
    model = PhiMoE.load(bundle("plain", "cpu", "none"))
    with pytest.raises(
        OutOfMemoryError, match=r"a cache of 1000000000000 x 64 tokens: out of memory; it needs \d+\.\d\d GB"
    ):
        model.decoder(10**12, 64)


def test_a_limit_is_for_cuda(bundle: Callable[..., Path]) -> None:
    with pytest.raises(DeviceError, match="memory_limit is for device='cuda'"):
        PhiMoE.load(bundle("plain", "cpu", "none"), memory_limit=10**9)
