"""The Python runtime against cases.json, which other languages' tests read too, and the bundle in the repository
against the exporter.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from phimoe_onnx import PhiMoE, errors, export
from phimoe_onnx.exporter import trace
from phimoe_onnx.files import sha256
from phimoe_onnx.runtime.sampling import Sampling, sample
from tests import captures
from tests.checkpoints import MODEL

HERE = Path(__file__).parents[1] / "spec"
BUNDLE = HERE / "bundle"
CASES = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))


def cases(kind: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in CASES["cases"] if kind in case]


@pytest.fixture(scope="module")
def model() -> PhiMoE:
    return PhiMoE.load(BUNDLE)


@pytest.mark.parametrize("capture", [captures.capture, captures.kept])
def test_the_bundle_is_what_the_exporter_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capture: Callable[..., ir.Model]
) -> None:
    monkeypatch.setattr(trace, "capture", capture)
    fresh = export(MODEL, tmp_path / "bundle", quantize="int4", operators="stock")
    names = sorted(path.name for path in fresh.iterdir())
    assert names == sorted(path.name for path in BUNDLE.iterdir())
    assert filecmp.cmpfiles(fresh, BUNDLE, names, shallow=False) == (names, [], []), "run python -m spec.make_cases"


@pytest.mark.parametrize("case", [case for case in cases("expected") if "bundle" not in case.values[0]])
def test_generation(model: PhiMoE, case: dict[str, Any]) -> None:
    check_generation(model, case)


def check_generation(model: PhiMoE, case: dict[str, Any]) -> None:
    batch = "batch" in case
    given = case["batch"] if batch else case["prompt"]
    expected = case["expected"] if batch else [case["expected"]]
    generated = model.generate(given, **case["options"])
    streamed = [""] * len(expected)
    for piece in model.generate(given, stream=True, **case["options"]):
        streamed[piece.row] += piece.text
    for row, generation in enumerate(generated if isinstance(generated, list) else [generated]):
        assert {name: getattr(generation, name) for name in expected[row]} == expected[row]
        assert streamed[row] == expected[row]["text"]


@pytest.mark.parametrize("case", [case for case in cases("error") if "bundle" not in case.values[0]])
def test_bad_prompts_and_options(model: PhiMoE, case: dict[str, Any]) -> None:
    with pytest.raises(getattr(errors, case["error"])) as raised:
        model.generate(case.get("prompt", case.get("batch")), **case["options"])
    assert [name for name in case["names"] if name not in str(raised.value)] == []


@pytest.mark.parametrize("case", cases("bundle"))
def test_changed_bundles(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    for step, *arguments in case["bundle"]:
        change(folder, step, *arguments)
    if "expected" in case:
        check_generation(PhiMoE.load(folder, **case["load"]), case)
        return
    with pytest.raises(getattr(errors, case["error"])) as raised:
        PhiMoE.load(folder, **case["load"])
    assert [name for name in case["names"] if name not in str(raised.value)] == []


def change(folder: Path, step: str, *arguments: Any) -> None:
    """One step of a case's `bundle`, as spec/embedding.md says."""
    path = folder / arguments[0]
    if step == "delete":
        path.unlink()
    elif step == "copy":
        shutil.copyfile(path, folder / arguments[1])
    elif step in ("replace", "replace all"):
        old, new = (text.encode() for text in arguments[1:])
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1 if step == "replace" else -1))
    else:
        change_manifest(folder, step, *arguments)


def change_manifest(folder: Path, step: str, place: str, *values: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if step == "list":
        path = folder / place
        manifest["files"][place] = {"size": path.stat().st_size, "sha256": sha256(path)}
    else:
        *keys, last = (key.replace("~1", "/").replace("~0", "~") for key in place.split("/")[1:])
        parent: Any = manifest
        for key in keys:
            parent = parent[int(key) if isinstance(parent, list) else key]
        place_in_parent: Any = int(last) if isinstance(parent, list) else last
        if step == "set":
            (parent[place_in_parent],) = values
        else:
            del parent[place_in_parent]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_encodings(model: PhiMoE) -> None:
    for case in CASES["encodings"]:
        assert model.encode(case["text"]) == case["token_ids"]


def test_streams(model: PhiMoE) -> None:
    for case in CASES["streams"]:
        characters = model.tokenizer.stream(case["prompt"])
        assert [characters.add(id) for id in case["token_ids"]] == case["pieces"]


def test_draws() -> None:
    for case in CASES["draws"]:
        logits, sampling = np.array(case["logits"], np.float32), Sampling(**case["options"])
        assert [sample(logits, sampling, step) for step in range(len(case["token_ids"]))] == case["token_ids"]
