"""phimoe-bench: its arithmetic, its table and what it says where a candidate cannot run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx import memory
from phimoe_onnx.bench import compare
from phimoe_onnx.bench.traffic import read_bandwidth, step_bytes
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.cli.bench import main
from phimoe_onnx.runtime.model import PhiMoE

Bundle = Callable[..., Path]


@pytest.mark.parametrize(("target", "quantize", "expert_bits", "matrix_bits"), [
    ("cpu", "none", 32, 32), ("cpu", "int4", 4 + 32 / 32, 4 + 32 / 32), ("cuda", "none", 16, 16),
])  # fmt: skip
def test_a_step_reads_the_chosen_experts_and_everything_else(
    bundle: Bundle, target: str, quantize: str, expert_bits: float, matrix_bits: float
) -> None:
    folder = bundle("plain", target, quantize)
    cache = 2 * 2 * 2 * 16 * (2 if target == "cuda" else 4)  # two layers' keys and values, 2 heads of 16
    attention, head, router, expert = 64 * 64 * 2 + 64 * 32 * 2, 64 * 2048, 64 * 16 * 32, 3 * 64 * 96
    one = 2 * ((attention * matrix_bits + router) + 2 * expert * expert_bits) + head * matrix_bits
    assert step_bytes(folder, read_manifest(folder), 1, 10) == pytest.approx(one / 8 + 10 * cache)
    many = 2 * ((attention * matrix_bits + router) + 16 * expert * expert_bits) + head * matrix_bits
    assert step_bytes(folder, read_manifest(folder), 1000, 10) == pytest.approx(many / 8 + 10_000 * cache)


def test_a_window_bounds_what_is_read(bundle: Bundle) -> None:
    folder = bundle("window", "cpu", "none")
    manifest = read_manifest(folder)
    assert step_bytes(folder, manifest, 1, 9) == step_bytes(folder, manifest, 1, 100)


def test_bandwidth_is_that_of_a_memory() -> None:
    assert 1e8 < read_bandwidth(1) < 1e12


def test_the_table(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle("plain", "cpu", "int8")
    monkeypatch.setattr(compare, "EXPERTS", ("eager",))
    arguments = ["--batch", "1", "2", "--prompt", "20", "--new-tokens", "6", "--threads", "1", "--bandwidth", "20"]
    file = tmp_path / "bench.json"
    assert main([str(folder), *arguments, "--peers", "--reference", "nowhere", "--json", str(file)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = json.loads(file.read_text())["rows"]
    assert len(printed) == 2 + len(rows) == 2 + 2 * 3
    ours, genai, transformers = rows[:3]
    model = PhiMoE.load(folder, threads=1)
    prompt = [3 + (31 * n * n + 17 * n) % (2048 - 3) for n in range(20)]
    model.eos = frozenset()
    assert ours["speed"]["token_ids"] == [model.generate(prompt, max_new_tokens=6).token_ids]
    assert ours["share"] == pytest.approx(ours["speed"]["decode"] * step_bytes(folder, model.manifest, 1, 23) / 20e9)
    assert genai["candidate"] == "onnxruntime-genai"
    assert genai["same"] == 1
    assert transformers["speed"] is None
    assert transformers["problem"]
    assert rows[3]["batch"] == 2
    assert len(rows[3]["speed"]["token_ids"]) == 2


def test_peers_that_are_not_here_are_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(bundle("plain", "cpu", "int8"))

    def problems(reference: str | None, *installed: str) -> dict[str, str]:
        monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: name if name in installed else None)
        return {each.name: each.problem for each in compare.candidates(folder, reference, True, "cpu")}

    assert problems(None) == {
        "phimoe-onnx": "",
        "onnxruntime-genai": "not installed (pip install onnxruntime-genai)",
        "transformers": "not installed (pip install transformers)",
    }
    assert problems(None, "onnxruntime_genai", "transformers")["transformers"] == "not installed (pip install torch)"
    here = ("onnxruntime_genai", "transformers", "torch")
    assert problems(None, *here)["transformers"] == "needs --reference, the checkpoint's folder"
    assert [*problems("somewhere", *here).values()] == [""] * (2 + len(compare.EXPERTS))


def test_the_memory_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numpy as np

    before = memory.peak_memory()
    np.ones(100 << 20, np.uint8).sum()
    after = memory.peak_memory()
    assert before is not None
    assert after is not None
    assert after > 100 << 20
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "nothing")  # no Linux
    assert memory.peak_memory() == pytest.approx(after, rel=0.5)
    monkeypatch.setitem(sys.modules, "resource", None)  # nor another POSIX
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory.peak_memory() is None


@pytest.mark.parametrize(("arguments", "words"), [
    (["--new-tokens", "1"], "--new-tokens must be 2 or more"),
    (["--prompt", "5000"], "the prompt has 5000 tokens, which leaves no room in the context"),
    (["--device", "cuda"], "has no CUDAExecutionProvider"),
])  # fmt: skip
def test_options_that_do_not_fit(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([str(bundle("plain", "cpu", "int8")), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_other_tasks_are_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle("plain", "cpu", "none", "feature-extraction"))]) == 1
    assert "is for feature-extraction; phimoe-bench times text generation" in capsys.readouterr().err
