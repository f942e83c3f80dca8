"""Opens a bundle's graph in ONNX Runtime, on the device that was asked for and on no other."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime as ort

from phimoe_onnx.bundle import SAMPLING, Graph, Manifest
from phimoe_onnx.errors import DeviceError
from phimoe_onnx.runtime.cuda import why_no_cuda
from phimoe_onnx.runtime.mapped import released

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3  # ONNX Runtime's log severity


def open_session(bundle: Path, manifest: Manifest, device: str, threads: int | None) -> ort.InferenceSession:
    """A session over the first graph of the manifest that the installed ONNX Runtime can load.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        device: "cpu" or "cuda".
        threads: threads for one operator; None leaves it to ONNX Runtime, which takes one a physical core.

    Raises:
        DeviceError: the device is unknown or not available, the bundle was not exported for it, or ONNX Runtime is too old
            for the bundle or refuses its graph.

    """
    check_device(device, manifest.target)
    if threads is not None and threads < 1:
        raise DeviceError(f"threads is {threads}, expected 1 or more, or None for ONNX Runtime's own choice")
    path = bundle / choose_graph(manifest, ort.__version__).file
    with released(bundle):
        return _open(path, device, threads)


def open_sampling(bundle: Path, device: str) -> ort.InferenceSession:
    """A session over the bundle's sampling graph; raises DeviceError as `open_session` does."""
    return _open(bundle / SAMPLING, device, None)


def _open(path: Path, device: str, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    provider = PROVIDERS[device]
    if device == "cuda":
        ort.preload_dlls()  # of the nvidia packages that the extra [gpu] brings
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's exceptions have no common base below this
        raise DeviceError(f"{path}: ONNX Runtime {ort.__version__} cannot load it on {device}: {error}") from error
    if provider not in session.get_providers():
        raise DeviceError(f"device is {device!r}, but ONNX Runtime {ort.__version__} could not start its {provider}: {why_no_cuda()}")
    return session


def check_device(device: str, target: str) -> None:
    """Raises DeviceError unless `device` is known, present, and the one that a bundle of `target` was exported for."""
    if device not in PROVIDERS:
        raise DeviceError(f"device is {device!r}, expected one of {', '.join(PROVIDERS)}")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise DeviceError(
            f"device is {device!r}, but the installed ONNX Runtime {ort.__version__} has no {PROVIDERS[device]}; "
            "install onnxruntime-gpu in place of onnxruntime, or use device='cpu'"
        )
    if target not in (device, "portable"):
        raise DeviceError(f"the bundle was exported for {target}, not for {device}; export it again with --target {device}")


def choose_graph(manifest: Manifest, installed: str) -> Graph:
    """The manifest's first graph that ONNX Runtime `installed` ("1.32.0") loads.

    Raises:
        DeviceError: every graph needs a newer release.

    """
    for graph in manifest.graphs:
        if _release(graph.minimum_onnxruntime) <= _release(installed):
            return graph
    needed = min((graph.minimum_onnxruntime for graph in manifest.graphs), key=_release)
    raise DeviceError(f"the bundle needs ONNX Runtime {needed} or newer, installed is {installed}; pip install --upgrade onnxruntime")


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a release: "1.32.0+cu13" -> (1, 32, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
