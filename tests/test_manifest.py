"""The manifest as an untrusted file: what is read, refused, kept; spec/cases.json has more, for all languages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from phimoe_onnx import PhiMoE, bundle_v1
from phimoe_onnx.bundle import StoredWeights, read_manifest, record
from phimoe_onnx.errors import BundleError, DeviceError
from phimoe_onnx.runtime.ort.external_data import check_external_data, locations

BUNDLE = Path(__file__).parents[1] / "spec" / "bundle"
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


def linked(folder: Path, manifest: Any) -> Path:
    """The bundle with another manifest, its files as links."""
    folder.mkdir()
    for path in BUNDLE.iterdir():
        if path.name != "manifest.json":
            (folder / path.name).symlink_to(path)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"format_version": ' + "9" * 5000 + "}", "null", "[]", '"a"', "{", "", "\x00", "NaN", "\ufeff{}"],
)
def test_a_manifest_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_what_a_tool_writes_back_keeps_every_key(tmp_path: Path) -> None:
    strange = {"a": [1, {"b": None}]}
    folder = linked(tmp_path / "bundle", MANIFEST | {"comment": strange})
    record(folder, "parity", {"passed": True})
    written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert written == MANIFEST | {"comment": strange, "parity": {"passed": True}}
    assert read_manifest(folder).parity == {"passed": True}


def test_a_link_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text(json.dumps(MANIFEST), encoding="utf-8")
    folder = linked(tmp_path / "bundle", {})
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(blob)
    with pytest.raises(BundleError, match=r"is a link to .*blob, which is left as it is"):
        record(folder, "parity", {})
    assert (folder / "manifest.json").is_symlink()
    assert json.loads(blob.read_text(encoding="utf-8")) == MANIFEST


@pytest.mark.parametrize("target", ["blob", "nowhere"])
def test_a_link_at_the_drafts_name_is_not_written_through(tmp_path: Path, target: str) -> None:
    (tmp_path / "blob").write_text("keep", encoding="utf-8")
    folder = linked(tmp_path / "bundle", MANIFEST)
    (folder / ".manifest.json").symlink_to(tmp_path / target)
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be written \(File exists\)"):
        record(folder, "parity", {})
    assert (tmp_path / "blob").read_text(encoding="utf-8") == "keep"
    assert not (tmp_path / "nowhere").exists()
    assert (folder / ".manifest.json").is_symlink()


def test_a_draft_of_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    folder = linked(tmp_path / "bundle", MANIFEST)
    (folder / ".manifest.json").write_text("{", encoding="utf-8")
    record(folder, "parity", {"passed": True})
    assert read_manifest(folder).parity == {"passed": True}
    assert not (folder / ".manifest.json").exists()


def test_another_device_is_said_before_a_dtype_that_this_one_lacks(tmp_path: Path) -> None:
    changed = copy.deepcopy(MANIFEST)
    changed["graphs"] = [{"file": "model.onnx", "devices": {"cuda": "1.31"}}]
    changed["decoding"]["cache"]["dtype"] = "bfloat16"
    with pytest.raises(DeviceError, match="runs on cuda, not on cpu; export it again with --target cpu"):
        PhiMoE.load(linked(tmp_path / "bundle", changed))


@pytest.mark.parametrize(
    ("target", "dtype", "devices"),
    [
        ("cpu", "float32", {"cpu": "1.30"}),
        ("portable", "float32", {"cpu": "1.30", "cuda": "1.30"}),
        ("cuda", "float16", {"cuda": "1.30", "cpu": "1.32"}),
        ("cuda", "bfloat16", {"cuda": "1.30"}),
    ],
)
def test_version_1(tmp_path: Path, target: str, dtype: str, devices: dict[str, str]) -> None:
    old = copy.deepcopy(MANIFEST) | {"format_version": 1, "target": target, "dtype": dtype}
    old["graphs"] = [{"file": "model.onnx", "minimum_onnxruntime": "1.30", "optional_inputs": []}]
    old["weights"] = {"experts": "int4, block 32", "lm_head": "float16", "norms": "float32"}
    manifest = read_manifest(linked(tmp_path / "bundle", old))
    assert [graph.devices for graph in manifest.graphs] == [devices]
    experts = ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")
    assert manifest.weights == (
        StoredWeights(experts, (0, 3), "int4", 32, dtype),
        StoredWeights(("lm_head.weight",), None, "float16"),
    )


def test_damage_to_version_1_is_found_like_any_other(tmp_path: Path) -> None:
    for key in ("graphs", "decoding", "files"):
        for value in (None, [], [1], {"a": 1}, "a", 5):
            old = copy.deepcopy(MANIFEST) | {"format_version": 1, key: value}
            bundle_v1.upgrade(old)
            with pytest.raises(BundleError, match=key):
                read_manifest(linked(tmp_path / f"{key}{value!r:.3}".replace("/", ""), old))


def test_external_data_is_found_in_subgraphs_and_functions() -> None:
    """Written field by field, as onnx.proto3 numbers them: a branch of an If, and an attribute of a function's node."""

    def field(number: int, *parts: bytes) -> bytes:
        inner = b"".join(parts)
        key = number << 3 | 2
        return bytes([key] if key < 0x80 else [key & 0x7F | 0x80, key >> 7]) + bytes([len(inner)]) + inner

    def tensor(location: bytes) -> bytes:
        return field(13, field(2, location), field(1, b"location"))  # the value before the key

    branch = field(1, field(5, field(6, field(5, tensor(b"a")))))
    sparse = field(15, field(1, tensor(b"b")), field(2, tensor(b"c")))
    function = field(25, field(7, field(5, field(5, tensor(b"d")))))
    assert list(locations(field(7, branch, sparse, field(5, tensor(b"e"))) + function)) == ["a", "b", "c", "e", "d"]


def test_a_field_number_that_other_parsers_read_otherwise_is_refused(tmp_path: Path) -> None:
    """A key of more than 32 bits: ONNX Runtime drops the upper ones, and would read field 7 here."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xba\x80\x80\x80\x10\x08location")
    with pytest.raises(BundleError, match=r"model\.onnx: is damaged"):
        check_external_data(path, {})
