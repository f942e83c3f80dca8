"""embed/rust, a reader of manifest and graph alone, writes `PhiMoE`'s tokens and text; `nox -s rust` builds it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import MODEL

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


def test_errors_are_one_line(bundle: Path, tmp_path: Path) -> None:
    for arguments, words in {
        (bundle, "a"): "usage: ",
        (tmp_path, "a", 3): f"{tmp_path}/manifest.json: No such file",
        (bundle, "", 3): "0 tokens of a prompt and 3 new ones",
        (bundle, "a", 5000): "in all up to 1024",
    }.items():
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
