"""The bundle of native operators in the repository and its tokens, which other languages' tests read too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phimoe_onnx import PhiMoE, operators
from tests.test_conformance import check_generation

HERE = Path(__file__).parents[1] / "spec" / "native"
CASES = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.skipif(operators.library() is None, reason="the native operators are not built here")
@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_generation(case: dict[str, Any]) -> None:
    check_generation(PhiMoE.load(HERE / "bundle"), case)
