"""Opens a bundle's graph in ONNX Runtime, on the device that was asked for and on no other."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from pathlib import Path

import onnxruntime as ort

from phimoe_onnx.bundle import SAMPLING, Graph, Manifest
from phimoe_onnx.errors import DeviceError, OutOfMemoryError
from phimoe_onnx.runtime.ort.driver import driver_problem, library_problem
from phimoe_onnx.runtime.ort.errors import memory_errors
from phimoe_onnx.runtime.ort.mapped import released

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# the release whose float16 MoE on the CPU is right; slower than a bundle for the CPU, and as exact as float16
CUDA_ON_CPU = "1.32"
_ERRORS_ONLY = 3  # ONNX Runtime's log severity


def open_session(
    bundle: Path,
    manifest: Manifest,
    device: str,
    threads: int | None,
    memory_limit: int | None = None,
    cuda_graphs: bool = False,
) -> ort.InferenceSession:
    """A session over the first graph of the manifest that the installed ONNX Runtime can load.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        device: "cpu" or "cuda".
        threads: threads for one operator; None leaves it to ONNX Runtime, which takes one a physical core.
        memory_limit: bytes on a CUDA device that weights and passes may take; None is all.
        cuda_graphs: whether the session can record and replay runs.

    Raises:
        OutOfMemoryError: the device has too little memory.
        DeviceError: the device is unknown or not available, the bundle was not exported for it, or ONNX Runtime is too
            old for the bundle or refuses its graph.

    """
    check_device(device, manifest.target)
    if device == "cpu" and manifest.dtype == "bfloat16":
        raise DeviceError(
            "the bundle's activations are bfloat16, which ONNX Runtime's CPU provider does not compute; use "
            "device='cuda'"
        )
    if threads is not None and threads < 1:
        raise DeviceError(f"threads is {threads}, expected 1 or more, or None for ONNX Runtime's own choice")
    for name, given in {"memory_limit": memory_limit is not None, "cuda_graphs": cuda_graphs}.items():
        if given and device != "cuda":
            raise DeviceError(f"{name} is for device='cuda', the device is {device!r}")
    path = bundle / choose_graph(manifest, ort.__version__).file
    with released(bundle):
        return _open(path, device, threads, memory_limit, cuda_graphs)


def open_sampling(bundle: Path, device: str) -> ort.InferenceSession:
    """A session over the bundle's sampling graph; raises DeviceError as `open_session` does."""
    return _open(bundle / SAMPLING, device, None)


def _open(
    path: Path, device: str, threads: int | None, memory_limit: int | None = None, cuda_graphs: bool = False
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    provider = PROVIDERS[device]
    choices = {}
    if device == "cuda":
        if problem := driver_problem():
            raise DeviceError(
                f"device is 'cuda', but ONNX Runtime {ort.__version__} could not start its {provider}: {problem}"
            )
        with redirect_stdout(None):  # what it prints about a missing library stands in the error below
            ort.preload_dlls()  # of the nvidia packages that the extra [gpu] brings
        # the arena would keep the raw weights beside those that QMoE has packed into memory of its own
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        choices = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}  # TF32 would choose other experts
        choices["enable_cuda_graph"] = str(int(cuda_graphs))
        if memory_limit is not None:
            choices["gpu_mem_limit"] = str(memory_limit)
    try:
        with memory_errors(
            f"loading {path} on {device}", sum(file.stat().st_size for file in path.parent.glob("*.data"))
        ):
            session = ort.InferenceSession(str(path), options, providers=[(provider, choices)], enable_fallback=0)
    except OutOfMemoryError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base below this
        reason = re.search(r"CUDA failure \d+: [^;]*[^; ]", str(error))  # the rest is a C++ backtrace
        said = reason[0] if reason else error
        raise DeviceError(f"{path}: ONNX Runtime {ort.__version__} cannot load it on {device}: {said}") from error
    if provider not in session.get_providers():
        raise DeviceError(
            f"device is {device!r}, but ONNX Runtime {ort.__version__} could not start its {provider}: "
            f"{library_problem()}"
        )
    return session


def check_device(device: str, target: str) -> None:
    """Raises DeviceError unless `device` is known, present, and one that a bundle of `target` runs on."""
    if device not in PROVIDERS:
        raise DeviceError(f"device is {device!r}, expected one of {', '.join(PROVIDERS)}")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise DeviceError(
            f"device is {device!r}, but the installed ONNX Runtime {ort.__version__} has no {PROVIDERS[device]}; "
            "install onnxruntime-gpu in place of onnxruntime, or use device='cpu'"
        )
    if target == "cuda" and device == "cpu":
        if _release(ort.__version__) < _release(CUDA_ON_CPU):
            raise DeviceError(
                f"the CPU runs a bundle for cuda from ONNX Runtime {CUDA_ON_CPU} on, installed is {ort.__version__}"
            )
    elif target not in (device, "portable"):
        raise DeviceError(
            f"the bundle was exported for {target}, not for {device}; export it again with --target {device}"
        )


def choose_graph(manifest: Manifest, installed: str) -> Graph:
    """The manifest's first graph that ONNX Runtime `installed` ("1.32.0") loads.

    Raises:
        DeviceError: every graph needs a newer release.

    """
    for graph in manifest.graphs:
        if _release(graph.minimum_onnxruntime) <= _release(installed):
            return graph
    needed = min((graph.minimum_onnxruntime for graph in manifest.graphs), key=_release)
    raise DeviceError(
        f"the bundle needs ONNX Runtime {needed} or newer, installed is {installed}; pip install --upgrade onnxruntime"
    )


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a release: "1.32.0+cu13" -> (1, 32, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
