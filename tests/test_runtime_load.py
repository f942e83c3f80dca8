"""What stands in the way of loading a bundle, and which of its graphs is taken."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from phimoe_onnx.bundle import File, Graph, describe_files, read_manifest
from phimoe_onnx.errors import BundleError, DeviceError, PhiMoEError
from phimoe_onnx.runtime import PhiMoE
from phimoe_onnx.runtime.ort.session import choose_graph
from tests.toy_bundle import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_the_runtime_imports_neither_torch_nor_transformers_nor_the_exporter() -> None:
    code = (
        "import sys, phimoe_onnx.runtime, phimoe_onnx.cli.generate, phimoe_onnx.cli.chat\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'onnx') or m == "
        "'phimoe_onnx.export'])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_first_graph_that_the_installed_release_loads_is_taken(bundle: Path) -> None:
    graphs = (Graph("new.onnx", {"cpu": "1.31"}), Graph("old.onnx", {"cpu": "1.29.1", "cuda": "1.31"}))
    files = dict.fromkeys(("new.onnx", "old.onnx", "tokenizer.json"), File(0, "0" * 64))
    manifest = replace(read_manifest(bundle), graphs=graphs, files=files)
    taken = {
        release: choose_graph(manifest, "cpu", release).file
        for release in ("1.32.0", "1.31.1+cu13", "1.31", "1.30.9", "1.29.1")
    }
    assert taken == {
        "1.32.0": "new.onnx",
        "1.31.1+cu13": "new.onnx",
        "1.31": "new.onnx",
        "1.30.9": "old.onnx",
        "1.29.1": "old.onnx",
    }
    with pytest.raises(
        DeviceError, match=r"needs ONNX Runtime 1\.29\.1 or newer on cpu, installed is 1\.29\.0.*upgrade"
    ):
        choose_graph(manifest, "cpu", "1.29.0")
    assert choose_graph(manifest, "cuda", "1.32").file == "old.onnx"
    unknown = (replace(graphs[0], requires=("operators/7", "a")), graphs[1])
    assert choose_graph(replace(manifest, graphs=unknown), "cpu", "1.32").file == "old.onnx"
    with pytest.raises(DeviceError, match="requires a, operators/7, which is not known here"):
        choose_graph(replace(manifest, graphs=unknown[:1]), "cpu", "1.32")


def test_a_bundle_for_a_newer_onnxruntime_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", minimum_onnxruntime="99.1")
    with pytest.raises(
        DeviceError, match=rf"needs ONNX Runtime 99\.1 or newer on cpu, installed is {onnxruntime.__version__}"
    ):
        PhiMoE.load(tmp_path / "bundle")


def test_a_graph_that_onnxruntime_refuses_is_named(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    graph = tmp_path / "bundle" / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"GroupQueryAttention", b"GroupQueryAttentiom"))
    rewrite_manifest(tmp_path / "bundle")
    with pytest.raises(DeviceError, match=r"model\.onnx: ONNX Runtime .* cannot load it on cpu"):
        PhiMoE.load(tmp_path / "bundle")


def test_devices(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="device is 'tpu', expected one of cpu, cuda"):
        PhiMoE.load(bundle, device="tpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="no CUDAExecutionProvider; install onnxruntime-gpu"):
        PhiMoE.load(bundle, device="cuda")
    monkeypatch.undo()
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(DeviceError, match="the bundle runs on cpu, not on cuda; export it again with --target cuda"):
        PhiMoE.load(bundle, device="cuda")
    with pytest.raises(DeviceError, match="threads is 0"):
        PhiMoE.load(bundle, threads=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": "1"}, "slots is '1', expected an integer"),
        ({"slots": None}, "slots is None, expected an integer"),
        ({"queue": False}, "queue is False, expected an integer"),
        ({"capacity": 16.0}, "capacity is 16.0, expected an integer"),
        ({"capacity": -(10**5000)}, "capacity is a int of too many digits, expected 1 or more"),
        ({"threads": "2"}, "threads is '2', expected 1 to"),
        ({"threads": True}, "threads is True, expected 1 to"),
        ({"device": ["cpu"]}, r"device is \['cpu'\], expected one of cpu, cuda"),
        ({"cuda_graphs": 1}, "cuda_graphs is for device='cuda'"),
    ],
)
def test_options_of_other_types_are_named(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PhiMoEError, match=message):
        PhiMoE.load(bundle, **options)


def test_numpys_small_integers_are_integers(bundle: Path) -> None:
    model = PhiMoE.load(bundle, slots=np.uint8(7), capacity=np.uint8(40))
    assert len(model.generate([5, 6], max_new_tokens=1).token_ids) <= 1


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_device_that_does_not_start_is_no_silent_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "bundle", "portable")
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(DeviceError, match=r"could not start its CUDAExecutionProvider|cannot load it on cuda"):
        PhiMoE.load(tmp_path / "bundle", device="cuda")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle.*manifest\.json"):
        PhiMoE.load(tmp_path / "nothing")


def test_a_missing_or_changed_file_is_named(bundle: Path) -> None:
    (bundle / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(BundleError, match=r"generation_config\.json"):
        PhiMoE.load(bundle)
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: is missing|generation_config\.json"):
        PhiMoE.load(bundle)


def test_a_bundle_for_another_task_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"task": "summarization"}))
    with pytest.raises(
        BundleError,
        match="for summarization, expected one for text-generation, text-classification, feature-extraction",
    ):
        PhiMoE.load(bundle)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "decoding"),
        ({"context": None}, "decoding.context: Expected `int`, got `null`"),
        ({"rope_boundary": 0}, "decoding.rope_boundary: Expected `int` >= 1"),
        ({"eos_token_ids": ["</s>"]}, "decoding.eos_token_ids.*: Expected `int`, got `str`"),
        ({"cache": {"num_hidden_layers": 2}}, "decoding.cache: .*num_key_value_heads"),
    ],
)
def test_a_damaged_decoding_section_is_named(bundle: Path, section: dict[str, Any] | None, message: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    decoding = manifest.pop("decoding")
    if section is not None:
        manifest["decoding"] = decoding | section
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"damaged.*{message}.*export the bundle again"):
        PhiMoE.load(bundle)


def rewrite_manifest(bundle: Path) -> None:
    """Makes the manifest agree with the files as they are now."""
    replace(read_manifest(bundle), files=describe_files(bundle)).write(bundle)
