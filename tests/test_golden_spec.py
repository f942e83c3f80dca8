"""The golden file in the repository, and what every language finds with it and with changed copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phimoe_onnx import GoldenError, verify_golden
from phimoe_onnx.bundle import read_manifest
from spec.make_golden import BUNDLE, CASES, FILE, changed, expected, limits
from tests.test_conformance import change

SPEC = json.loads(CASES.read_text(encoding="utf-8"))


def near(value: Any) -> Any:
    """With every number within the tolerance of the file."""
    if isinstance(value, dict):
        return {name: near(each) for name, each in value.items()}
    if isinstance(value, list):
        return [near(each) for each in value]
    return pytest.approx(value, rel=SPEC["tolerance"]) if isinstance(value, float) else value


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in SPEC["cases"]])
def test_a_changed_file(tmp_path: Path, case: dict[str, Any]) -> None:
    file, bundle = tmp_path / "golden", BUNDLE
    file.write_bytes(changed(FILE.read_bytes(), case["changes"]))
    if "bundle" in case:
        bundle = shutil.copytree(BUNDLE, tmp_path / "bundle")
        for step in case["bundle"]:
            change(bundle, *step)
    if "error" in case:
        with pytest.raises(GoldenError) as raised:
            verify_golden(bundle, file)
        assert str(raised.value).startswith(f"{file}: ")
        assert [word for word in case["error"] if word not in str(raised.value)] == []
        return
    report = verify_golden(bundle, file)
    found = json.loads(json.dumps(expected(report)))
    assert found == near(case["expected"])
    assert set(case.get("notes", [])) <= set(report.notes)
    assert bool(report.failures) == any(not check["passed"] for check in case["expected"]["checks"])


def test_the_limits_are_those_of_today() -> None:
    assert limits(read_manifest(BUNDLE)) == SPEC["limits"]
