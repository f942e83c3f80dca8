"""phimoe-bench: its arithmetic, its table and what it says where a candidate cannot run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx import memory
from phimoe_onnx.bench import compare, peer
from phimoe_onnx.bench.compare import Candidate, Row, processor
from phimoe_onnx.bench.peer import Work
from phimoe_onnx.bench.traffic import read_bandwidth, step_bytes
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.cli.bench import _table, main
from phimoe_onnx.errors import PhiMoEError
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


def test_bandwidth_of_a_mapped_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.data"
    file.write_bytes(bytes(1 << 24))
    assert 1e7 < read_bandwidth(2, file) < 1e12
    assert 1e7 < (compare.bandwidth("cpu", 1, tmp_path) or 0) < 1e12


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


SPEED = {"load": 2.0, "prefill": 100.0, "decode": 10.0, "memory": 3, "token_ids": [[1, 2, 3, 4]], "anonymous": None}


def write_peer(folder: Path, name: str, code: str) -> Candidate:
    """A peer whose interpreter is a script of this name: it gets what a Python would get."""
    script = folder / name
    script.write_text(f"#!{sys.executable}\nimport json, os, sys\nSPEED = {SPEED!r}\n{code}\n")
    script.chmod(0o755)
    return Candidate(name, "vllm", {"checkpoint": "here"}, python=str(script))


def test_rounds_take_turns_and_give_medians(tmp_path: Path) -> None:
    work = Work(1, 8, 4, "cpu", 1, 100)
    count = """
turns = open(os.path.dirname(sys.argv[0]) + "/turns", "a+")
turns.write(os.path.basename(sys.argv[0]) + " ")
turns.seek(0)
number = turns.read().count(os.path.basename(sys.argv[0]))
options = json.loads(sys.argv[4])
assert sys.argv[1] == "-P" and sys.argv[3] == "vllm" and options["checkpoint"] == "here", sys.argv
decode = {"first": [10.0, 30.0, 20.0], "second": [7.0, 5.0, 6.0]}[os.path.basename(sys.argv[0])][number - 1]
print("a library's chatter")
print(json.dumps(SPEED | {"decode": decode, "memory": number, "token_ids": [[1, 2, 3, 3 + number]]}))
"""
    chosen = [write_peer(tmp_path, name, count) for name in ("first", "second")]
    rows: dict[str, Row] = {}
    for number in range(3):
        for candidate in chosen:
            assert len(compare.take_turn(candidate, work, rows).rounds) == number + 1
    assert (tmp_path / "turns").read_text() == "first second " * 3
    first, second = rows.values()
    assert first.speed is not None
    assert second.speed is not None
    assert (first.speed.decode, first.spread("decode"), first.speed.memory) == (20.0, (10.0, 30.0), 2)
    assert (second.speed.decode, second.spread("decode"), second.speed.anonymous) == (6.0, (5.0, 7.0), None)
    chosen = [dataclasses.replace(chosen[0], function="ours", weights="w"), dataclasses.replace(chosen[1], weights="w")]
    compare.judge(chosen, work, rows, None)
    assert (first.same, second.same) == (None, 0.75)  # the worst round counts
    lines = _table([first, second]).splitlines()
    assert "| 20.0 (10.0 to 30.0) |" in lines[2]
    assert lines[3].startswith("| second | 1 | 2.0 (2.0 to 2.0) | 100 (100 to 100) | 6.0 (5.0 to 7.0) |")


@pytest.mark.parametrize(("code", "words"), [
    ("sys.exit('no such model\\nRuntimeError: a | of the peer')", "RuntimeError: a | of the peer"),
    ("sys.exit(3)", "ended with 3"),
    ("os.kill(os.getpid(), 4)", "ended by signal 4"),
    ("print('nothing')", "gave no measurement"),
    ("pass", "gave no measurement"),
])  # fmt: skip
def test_a_peer_that_fails_is_named_and_not_tried_again(tmp_path: Path, code: str, words: str) -> None:
    failing = write_peer(tmp_path, "peer", f"open(__file__ + '.ran', 'a').write('x')\n{code}")
    rows: dict[str, Row] = {}
    for _ in range(2):
        compare.take_turn(failing, Work(1, 8, 4, "cpu", 1, 100), rows)
    assert words in rows["peer"].problem
    assert (tmp_path / "peer.ran").read_text() == "x"
    assert len(_table([rows["peer"]]).splitlines()[2].split(" | ")) == 10


def test_a_folder_of_peers(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that crashes, one whose interpreter is gone, one that could not be set up, and onnxruntime-genai."""
    folder, peers = str(bundle("plain", "cpu", "int8")), tmp_path / "peers"
    assert main([folder, "--peers", str(peers)]) == 1
    assert "has no peers; python -m benchmarks.set_up_peers" in capsys.readouterr().err
    peers.mkdir()
    gone = Candidate("gone", "vllm", {}, python=str(tmp_path / "nowhere"))
    found = [write_peer(tmp_path, "crashes", "sys.exit('Killed')"), gone, Candidate("absent", "", problem="no cmake")]
    found += [Candidate("onnxruntime-genai", "genai")]
    (peers / "all.json").write_text(json.dumps([dataclasses.asdict(each) for each in found]))
    file = tmp_path / "bench.json"
    options = ["--threads", "1", "--prompt", "9", "--new-tokens", "4", "--rounds", "2", "--json", str(file)]
    assert main([folder, "--peers", str(peers), *options]) == 0
    result = json.loads(file.read_text())
    assert not result["cut_short"]
    assert result["title"].endswith("rounds: 2")
    ours, *others = result["rows"]
    assert len(result["readings"]) == 3  # before the first round, and after each
    assert len(ours["rounds"]) == 2
    assert ours["speed"]["cache"] == "float32"
    assert ours["speed"]["decode"] == pytest.approx(sum(each["decode"] for each in ours["rounds"]) / 2)
    problems = {row["candidate"]: row["problem"] for row in others}
    assert problems["crashes"] == "Killed"
    assert "cannot be run (No such file or directory)" in problems["gone"]
    assert problems["absent"] == "no cmake"
    assert (others[3]["same"], others[3]["speed"]["cache"]) == (1, "float32")
    assert processor() in result["title"]
    (peers / "all.json").write_text("{}")
    assert main([folder, "--peers", str(peers)]) == 1
    assert "all.json: is no list of peers" in capsys.readouterr().err


def test_a_run_that_is_cut_short(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its second round a peer keeps what was saved after the first, and presses Ctrl-C."""
    folder, peers, file = str(bundle("plain", "cpu", "int8")), tmp_path / "peers", tmp_path / "bench.json"
    peers.mkdir()
    found = [write_peer(tmp_path, "fails", "sys.exit('a [/red] | of the peer')")]
    found += [
        write_peer(
            tmp_path,
            "interrupts",
            f"""
if not os.path.exists({str(file)!r}):
    print(json.dumps(SPEED))
else:
    os.rename({str(file)!r}, {str(tmp_path / "first.json")!r})
    os.kill(os.getppid(), 2)
    os.read(0, 1)
""",
        )
    ]
    found += [write_peer(tmp_path, "last", "print(json.dumps(SPEED | {'decode': 7.0}))")]
    (peers / "all.json").write_text(json.dumps([dataclasses.asdict(each) for each in found]))
    options = ["--threads", "1", "--prompt", "9", "--new-tokens", "4", "--bandwidth", "20", "--json", str(file)]
    assert main([folder, "--peers", str(peers), *options]) == 130
    output, errors = capsys.readouterr()
    first, last = json.loads((tmp_path / "first.json").read_text()), json.loads(file.read_text())
    assert [len(row["rounds"]) for row in first["rows"]] == [1, 0, 1, 1]
    assert [len(row["rounds"]) for row in last["rows"]] == [2, 0, 1, 1]
    assert first["rows"][2:] == last["rows"][2:]
    assert (len(first["readings"]), len(last["readings"])) == (2, 2)
    assert all(each["cut_short"] and each["title"].endswith("rounds: 3, cut short") for each in (first, last))
    title, _, _, _, *rows = output.splitlines()
    assert title == last["title"]
    ours = last["rows"][0]
    decode = [each["decode"] for each in ours["rounds"]]
    assert f"| {sum(decode) / 2:.1f} ({min(decode):.1f} to {max(decode):.1f}) | {ours['share']:.0%} |" in rows[0]
    assert rows[1].startswith("| fails | 1 | a [/red] / of the peer |")
    assert [row.split(" | ")[4] for row in rows[2:]] == ["10.0", "7.0"]
    lines = errors.splitlines()
    assert lines[1:4] == [
        "batch 1, round 1 of 3: fails: a [/red] | of the peer",
        "batch 1, round 1 of 3: interrupts: prefill 100, decode 10.0 tokens/s",
        "batch 1, round 1 of 3: last: prefill 100, decode 7.0 tokens/s",
    ]
    assert lines[4].startswith("batch 1, round 2 of 3: phimoe-onnx: prefill ")
    assert lines[6:] == [""]  # behind the terminal's ^C


def test_a_run_that_is_cut_short_at_once_writes_nothing(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_measure", interrupted)
    file = tmp_path / "bench.json"
    options = ["--bandwidth", "20", "--json", str(file)]
    assert main([str(bundle("plain", "cpu", "int8")), *options]) == 130
    assert capsys.readouterr() == ("", "\n")
    assert not file.exists()
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich's name for a terminal
    assert main([str(bundle("plain", "cpu", "int8")), *options]) == 130
    assert "batch 1, round 1 of 1: phimoe-onnx" in capsys.readouterr().err  # who was running


def test_bundles_of_one_name_have_rows_of_their_own(bundle: Bundle, tmp_path: Path) -> None:
    names = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copytree(bundle("plain", "cpu", "none"), tmp_path / place / "same")
        names.append(str(tmp_path / place / "same"))
    found = [each.name for each in compare.candidates(names, None, False, "cpu")]
    assert found == [f"phimoe-onnx, {name}" for name in names]
    with pytest.raises(PhiMoEError, match=r"a bundle is given twice: .*same/; give each once, and --rounds"):
        compare.candidates([names[0], f"{names[0]}/"], None, False, "cpu")


def test_a_pipe_gets_the_whole_alone(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([peer.Speed(1.0, 2.0, decode, None, [[1]]) for decode in (3.0, 4.0)])
    monkeypatch.setattr(compare, "_measure", lambda *_: next(speeds))
    read, write = os.pipe()
    options = ["--bandwidth", "20", "--rounds", "2", "--json", f"/dev/fd/{write}"]
    assert main([str(bundle("plain", "cpu", "int8")), *options]) == 0
    os.close(write)
    with open(read, encoding="utf-8") as opened:
        result = json.load(opened)  # which takes one
    assert not result["cut_short"]
    assert [each["decode"] for each in result["rows"][0]["rounds"]] == [3.0, 4.0]


def test_peers_with_a_folder_are_of_the_cpu(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle("plain", "cpu", "int8")), "--device", "cuda", "--peers", "somewhere"]) == 1
    assert "--peers FOLDER runs on the CPU alone" in capsys.readouterr().err


def test_a_peer_runs_without_this_package(tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.modules['phimoe_onnx'] = None; runpy.run_path({peer.__file__!r})"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)


def test_peers_that_are_not_here_are_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(bundle("plain", "cpu", "int8"))

    def problems(reference: str | None, *installed: str) -> dict[str, str]:
        monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: name if name in installed else None)
        return {each.name: each.problem for each in compare.candidates([folder], reference, True, "cpu")}

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
