"""The notebooks under examples: their cells run in order, and show what they promise."""

from __future__ import annotations

import ast
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """All names that the code cells leave, and the last value of each cell that ends with one, as Jupyter shows it."""
    names: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert (cell["execution_count"], cell["outputs"]) == (None, []), (
            "clear all outputs before the notebook is saved"
        )
        body = ast.parse("".join(cell["source"]))
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, f"{path.name}, cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), names))
    return names, [each for each in shown if each is not None]


def test_routing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(EXAMPLES)
    names, shown = run(EXAMPLES / "routing.ipynb")
    routing, hidden, usages = names["routing"], names["hidden"], names["usages"]
    tokens = len(routing.token_ids)
    assert len(names["tokens"]) == tokens
    assert routing.experts.shape == (4, tokens, 2)
    assert hidden.shape[:2] == (5, tokens)
    np.testing.assert_allclose(names["share"].sum(axis=1), 1)
    np.testing.assert_allclose(names["cosines"][-1], 1, rtol=1e-5)
    assert [usage.name for usage in usages] == ["Austen", "Bible"]
    *pictures, page = shown
    cells = [len(ElementTree.fromstring(picture._repr_svg_()).findall(".//{*}title")) for picture in pictures]
    assert cells == [64, 0, 64, 64]  # heat maps of 4 layers and 16 experts, and the lines between
    frames: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: frames.append(dict(attributes)["srcdoc"] or "")  # type: ignore[method-assign]
    parser.feed(page._repr_html_())
    assert [frame.startswith("<!doctype html>\n<!-- phimoe-experts -->") for frame in frames] == [True]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(("yes", "no")) for line in lines) == tokens
    assert sum("of the choices, elsewhere" in line for line in lines) == 6
