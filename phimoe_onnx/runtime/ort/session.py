"""Opens a bundle's graph in ONNX Runtime, on the device that was asked for and on no other."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import redirect_stdout
from pathlib import Path

import onnxruntime as ort

from phimoe_onnx import operators
from phimoe_onnx.bundle import NATIVE_OPERATORS, Graph, Manifest
from phimoe_onnx.errors import DeviceError, OutOfMemoryError, brief
from phimoe_onnx.runtime.ort.agreement import check_graph
from phimoe_onnx.runtime.ort.driver import driver_problem, library_problem
from phimoe_onnx.runtime.ort.errors import memory_errors
from phimoe_onnx.runtime.ort.external_data import check_external_data
from phimoe_onnx.runtime.ort.mapped import released
from phimoe_onnx.runtime.ort.per_token import is_per_token
from phimoe_onnx.runtime.ort.taps import Taps, tap
from phimoe_onnx.runtime.ort.threads import SPIN_DURATION, Sessions, check_threads, is_small

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# what a graph may require and this installation brings
PROVIDED = frozenset({NATIVE_OPERATORS} if operators.library() else ())
_QUIET = 4  # ONNX Runtime's log severity for what is fatal: an error is an exception with the same text


def open_sessions(
    bundle: Path,
    manifest: Manifest,
    device: str,
    threads: int | None,
    memory_limit: int | None = None,
    cuda_graphs: bool = False,
) -> Sessions:
    """Sessions over the first graph of the manifest that the installed ONNX Runtime can load on the device.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        device: "cpu" or "cuda".
        threads: threads for one operator; None is one a physical core, which is ONNX Runtime's choice, and a single one
            for passes that are too small for more.
        memory_limit: bytes on a CUDA device that weights and passes may take; None is all.
        cuda_graphs: whether the session can record and replay runs.

    Raises:
        OutOfMemoryError: the device has too little memory.
        DeviceError: the device is unknown or not available, the bundle was not exported for it, requires what is not
            known here, ONNX Runtime is too old for the bundle or refuses its graph, or `threads` is no number of them.
        BundleError: the graph reads files that the manifest does not list, or is not as the manifest says.

    """
    check_device(device)
    graph = choose_graph(manifest, device, ort.__version__)
    check_threads(threads)
    off = cuda_graphs is None or cuda_graphs is False
    for name, given in {"memory_limit": memory_limit is not None, "cuda_graphs": not off}.items():
        if given and device != "cuda":
            raise DeviceError(f"{name} is for device='cuda', the device is {device!r}")
    path = bundle / graph.file
    check_external_data(path, manifest.files)
    weights = sum(file.size for name, file in manifest.files.items() if name.endswith(".data"))
    with released(bundle):
        main = _open(path, device, threads, graph.requires, memory_limit, cuda_graphs)
        alone = threads is None and device == "cpu" and is_small(weights)
        single = _open(path, device, 1, graph.requires) if alone else None
    check_graph(main, manifest, path, graph.optional_inputs)
    return Sessions(main, single, weights, is_per_token(path.read_bytes()))


def open_sampling(bundle: Path, manifest: Manifest, device: str) -> ort.InferenceSession | None:
    """A session over the bundle's sampling graph, if it has one; raises as `open_sessions` does."""
    file = manifest.decoding.sampling_graph
    if file is None or device == "cpu":
        return None
    check_external_data(bundle / file, manifest.files)
    return _open(bundle / file, device, None, ())


def open_tapped(bundle: Path, manifest: Manifest, threads: int | None) -> tuple[ort.InferenceSession, Taps]:
    """A session on the CPU over the graph that `open_sessions` takes there, with values of its inside as outputs, too.

    Raises:
        OutOfMemoryError, DeviceError, BundleError: as `open_sessions`; or the graph has not the nodes that the exporter
            makes today.
    """
    graph = choose_graph(manifest, "cpu", ort.__version__)
    check_threads(threads)
    path = bundle / graph.file
    check_external_data(path, manifest.files)
    tapped, taps = tap(path, manifest.decoding.cache.num_hidden_layers)
    with released(bundle):
        return _open(path, "cpu", threads, graph.requires, data=tapped), taps


def _open(
    path: Path,
    device: str,
    threads: int | None,
    requires: Collection[str],
    memory_limit: int | None = None,
    cuda_graphs: bool = False,
    data: bytes | None = None,
) -> ort.InferenceSession:
    """A session over the graph at `path`, or over `data` in its place, with the weights beside that file."""
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    # by any name: external_data.py knows this one
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.intra_op_num_threads = int(threads or 0)
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_DURATION)
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
            if NATIVE_OPERATORS in requires:
                options.register_custom_ops_library(str(operators.library()))
            if data is not None:
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent)
                )
            session = ort.InferenceSession(
                data or str(path), options, providers=[(provider, choices)], enable_fallback=0
            )
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


def check_device(device: str) -> None:
    """Raises DeviceError unless `device` is known and the installed ONNX Runtime has its provider."""
    if not isinstance(device, str) or device not in PROVIDERS:
        raise DeviceError(f"device is {brief(device)}, expected one of {', '.join(PROVIDERS)}")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise DeviceError(
            f"device is {device!r}, but the installed ONNX Runtime {ort.__version__} has no {PROVIDERS[device]}; "
            "install onnxruntime-gpu in place of onnxruntime, or use device='cpu'"
        )


def choose_graph(manifest: Manifest, device: str, installed: str) -> Graph:
    """The manifest's first graph that ONNX Runtime `installed` ("1.32.0") loads on `device`.

    Raises:
        DeviceError: no graph is for the device, every one requires what is not known here, or needs a newer release.

    """
    graphs = [graph for graph in manifest.graphs if device in graph.devices]
    if not graphs:
        known = ", ".join(sorted({name for graph in manifest.graphs for name in graph.devices}))
        raise DeviceError(f"the bundle runs on {known}, not on {device}; export it again with --target {device}")
    missing = sorted({name for graph in graphs for name in graph.requires if name not in PROVIDED})
    graphs = [graph for graph in graphs if PROVIDED.issuperset(graph.requires)]
    if not graphs:
        if missing == [NATIVE_OPERATORS]:
            raise DeviceError(
                "the bundle needs the native operators, which are not built here; install Rust's cargo and then "
                "phimoe-onnx again, or export with --operators stock"
            )
        raise DeviceError(
            f"the bundle requires {', '.join(missing)}, which is not known here; upgrade phimoe-onnx, or export again"
        )
    for graph in graphs:
        if _release(graph.devices[device]) <= _release(installed):
            return graph
    needed = min((graph.devices[device] for graph in graphs), key=_release)
    raise DeviceError(
        f"the bundle needs ONNX Runtime {needed} or newer on {device}, installed is {installed}; "
        "pip install --upgrade onnxruntime"
    )


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a release: "1.32.0+cu13" -> (1, 32, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
