"""embed/rust, a greedy reader of bundles, writes what `PhiMoE` does and what spec/cases.json says; `nox -s rust` builds
it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import MODEL
from tests.test_conformance import BUNDLE, CASES, change

PROGRAM = Path(__file__).parent.parent / "embed" / "rust" / "target" / "release" / "phimoe-generate"
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
pytestmark = pytest.mark.skipif(not PROGRAM.exists() or LIBRARY is None, reason="nox -s rust builds it, on Linux")

BUNDLES = {
    "cpu": {},
    "int4": {"quantize": "int4"},
    "int8 cache": {"kv_cache": "int8"},
    "portable": {"target": "portable"},
}


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's model as a bundle."""
    return export(MODEL, tmp_path_factory.mktemp("rust") / "bundle", **BUNDLES[request.param])


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY)}
    return subprocess.run([PROGRAM, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("prompt", "new"),
    [
        ("It was a fine morning, and Elizabeth", 300),  # across the rope boundary of 256
        ("And the LORD said unto Moses. " * 80, 40),  # from beyond it, in two chunks
        (" café, 日本 🙂 and\n\n", 20),
    ],
)
def test_a_text_continues_alike(bundle: Path, prompt: str, new: int) -> None:
    expected = PhiMoE.load(bundle).generate(prompt, max_new_tokens=new)
    done = run(bundle, prompt, new)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == expected.token_ids
    assert done.stdout == f"{expected.text}\n"


def test_a_chat_is_answered_alike(bundle: Path) -> None:
    expected = PhiMoE.load(bundle).generate([{"role": "user", "content": "Who is Anne?"}], max_new_tokens=60)
    done = run("--chat", bundle, "Who is Anne?", 60)
    assert (json.loads(done.stderr), done.stdout) == (expected.token_ids, f"{expected.text}\n")


def greedy_cases() -> Iterator[Any]:
    """Each prompt of the cases that are greedy and end at an end token or a number of tokens; rows go one by one."""
    for case in CASES["cases"]:
        if "expected" in case and "bundle" not in case and case["options"].keys() <= {"max_new_tokens"}:
            batch = "batch" in case
            prompts, results = (case["batch"], case["expected"]) if batch else ([case["prompt"]], [case["expected"]])
            for row, (prompt, expected) in enumerate(zip(prompts, results, strict=True)):
                yield pytest.param(
                    prompt, case["options"], expected, id=f"{case['name']} {row}" if batch else case["name"]
                )


@pytest.mark.parametrize(("prompt", "options", "expected"), [*greedy_cases()])
def test_generation(prompt: Any, options: dict[str, int], expected: dict[str, Any]) -> None:
    check_generation(BUNDLE, prompt, options, expected)


def check_generation(folder: Path, prompt: Any, options: dict[str, int], expected: dict[str, Any]) -> None:
    new = options.get("max_new_tokens", len(expected["token_ids"]))
    done = run("--json", folder, json.dumps(prompt), new)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stderr), done.stdout) == (expected["token_ids"], f"{expected['text']}\n")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case["name"]) for case in CASES["cases"] if "bundle" in case and not case["load"]],
)
def test_changed_bundles(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    for step, *arguments in case["bundle"]:
        change(folder, step, *arguments)
    if "expected" in case:
        check_generation(folder, case["prompt"], case["options"], case["expected"])
        return
    check_error(run(folder, "Emma", 3), case["error"], *case["names"])


def check_error(done: subprocess.CompletedProcess[str], kind: str, *words: str) -> None:
    """One line that begins with the kind and has the words."""
    assert done.returncode == 1
    assert done.stderr.startswith(f"{kind}: ")
    assert [word for word in words if word not in done.stderr] == []
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", 3), ("the prompt", "empty")),
        (("a", 0), ("max_new_tokens", "0")),
        (("a", "many"), ("max_new_tokens", "many")),
        (("a", 5000), ("max_new_tokens", "5000", "1024")),
        (("[5, 2048]", 3), ("2048", "2047")),
        (("[5, -1]", 3), ("-1",)),
        (("{", 3), ("JSON",)),
        (('[{"role": "wizard", "content": "a"}]', 3), ("role", "wizard")),
    ],
)
def test_bad_prompts_and_options(arguments: tuple[str, object], words: tuple[str, ...]) -> None:
    form = ["--json"] if arguments[0][:1] in ("[", "{") else []
    check_error(run(*form, BUNDLE, *arguments), "GenerationError", *words)


def test_usage() -> None:
    done = run(BUNDLE, "a")
    assert (done.returncode, done.stderr[:7]) == (2, "usage: ")
