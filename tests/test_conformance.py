"""The Python runtime against cases.json, which other languages' tests read too, and the bundle in the repository
against the exporter.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phimoe_onnx import PhiMoE, errors, export
from phimoe_onnx.runtime.sampling import Sampling, sample
from tests.checkpoints import MODEL

HERE = Path(__file__).parents[1] / "spec"
BUNDLE = HERE / "bundle"
CASES = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))


def cases(kind: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in CASES["cases"] if kind in case]


@pytest.fixture(scope="module")
def model() -> PhiMoE:
    return PhiMoE.load(BUNDLE)


def test_the_bundle_is_what_the_exporter_writes(tmp_path: Path) -> None:
    fresh = export(MODEL, tmp_path / "bundle", quantize="int4")
    names = sorted(path.name for path in fresh.iterdir())
    assert names == sorted(path.name for path in BUNDLE.iterdir())
    assert filecmp.cmpfiles(fresh, BUNDLE, names, shallow=False) == (names, [], []), "run python -m spec.make_cases"


@pytest.mark.parametrize("case", cases("expected"))
def test_generation(model: PhiMoE, case: dict[str, Any]) -> None:
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
def test_bad_bundles(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    change = case["bundle"]
    if "delete" in change:
        (folder / change["delete"]).unlink()
    if "replace" in change:
        name, old, new = change["replace"]
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8", newline="")
    if "manifest" in change:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        (folder / "manifest.json").write_text(json.dumps(manifest | change["manifest"]), encoding="utf-8")
    with pytest.raises(getattr(errors, case["error"])) as raised:
        PhiMoE.load(folder, **case["load"])
    assert [name for name in case["names"] if name not in str(raised.value)] == []


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
