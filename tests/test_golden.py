"""Golden files: what a later check finds with them alone, and which are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from phimoe_onnx import verify, verify_golden
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.cli.verify import main
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.parity import golden
from phimoe_onnx.parity.comparison import Comparison
from phimoe_onnx.parity.golden import SAMPLED, TOP, columns, compare, read_golden, seen, top_ids
from phimoe_onnx.parity.report import Report
from phimoe_onnx.parity.thresholds import DEFAULTS, Thresholds
from tests.test_verify import LOOSE, SHAPE, doctored

Make = Callable[..., Path]
Saved = Callable[..., tuple[Path, Report]]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved(bundle: Make, checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """saved(quantize, task="text-generation") -> the golden file of a bundle of SHAPE, and the report of its saving."""
    folder = tmp_path_factory.mktemp("golden")
    made: dict[tuple[str, str], tuple[Path, Report]] = {}

    def get(quantize: str, task: str = "text-generation") -> tuple[Path, Report]:
        if (quantize, task) not in made:
            file = folder / f"{quantize}-{task}"
            arguments = (bundle(SHAPE, "cpu", quantize, task), checkpoint(SHAPE, task))
            report = verify(*arguments, tokens=200, new_tokens=20, thresholds=Thresholds(), save_golden=file)
            made[quantize, task] = file, report
        return made[quantize, task]

    return get


def test_float32_passes_by_its_golden_file_alone(bundle: Make, saved: Saved) -> None:
    file, full = saved("none")
    calls: list[tuple[str, int, int]] = []
    report = verify_golden(bundle(SHAPE, "cpu", "none"), file, progress=lambda *call: calls.append(call))
    assert report.failures == []
    assert report.thresholds == DEFAULTS[32]
    assert (report.tokens, report.windows, report.perplexity) == (200, [100, 100], full.perplexity)
    assert report.greedy == full.greedy
    assert report.greedy["agreeing"] == 20
    found, expected = report.bundle_to_reference, full.bundle_to_reference
    assert (found.tokens, found.top1_agreement) == (200, expected.top1_agreement)
    assert 0.3 * expected.max_difference < found.max_difference <= expected.max_difference
    assert found.mean_difference == pytest.approx(expected.mean_difference, rel=0.2)
    assert report.bundle_to_stored is report.stored_to_reference is report.routing_agreement is None
    assert calls == [("running the bundle", done, 2) for done in range(3)]


def test_a_quantised_bundle_is_held_against_its_stored_weights(bundle: Make, saved: Saved) -> None:
    file, full = saved("int4")
    report = verify_golden(bundle(SHAPE, "cpu", "int4"), file, thresholds=LOOSE)
    assert report.failures == []
    assert [check.name for check in report.checks] == ["kl", "kernel_kl", "perplexity_ratio"]
    assert report.perplexity == full.perplexity
    assert report.routing_agreement == full.routing_agreement
    assert report.stored_to_reference == full.stored_to_reference
    for name in ("bundle_to_reference", "bundle_to_stored"):
        found, expected = getattr(report, name), getattr(full, name)
        assert found.top1_agreement == expected.top1_agreement
        assert found.kl == pytest.approx(expected.kl, rel=0.2)
        assert found.mean_difference == pytest.approx(expected.mean_difference, rel=0.2)
        assert found.max_difference <= expected.max_difference
    assert report.greedy["agreeing"] == full.greedy["agreeing"]


def test_another_bundle_of_the_checkpoint(bundle: Make, saved: Saved) -> None:
    """The file of float32 knows the reference's whole continuation, and nothing of int8's stored weights."""
    file, _ = saved("none")
    report = verify_golden(bundle(SHAPE, "cpu", "int8"), file, thresholds=LOOSE)
    assert [check.name for check in report.checks] == ["kl", "perplexity_ratio"]
    assert report.greedy["new_tokens"] == 20
    assert report.bundle_to_stored is None
    assert any(note.startswith("not checked: kernel_kl; ") for note in report.notes)
    assert sorted(report.perplexity) == ["bundle", "reference"]


@pytest.mark.parametrize(("task", "quantize"), [("text-classification", "int4"), ("feature-extraction", "none")])
def test_other_tasks_are_compared_in_full(bundle: Make, saved: Saved, task: str, quantize: str) -> None:
    file, full = saved(quantize, task)
    report = verify_golden(bundle(SHAPE, "cpu", quantize, task), file, thresholds=Thresholds())
    assert report.bundle_to_reference == full.bundle_to_reference
    assert report.bundle_to_stored == full.bundle_to_stored
    assert report.stored_to_reference == full.stored_to_reference
    assert len(report.notes) == 1


def test_a_doctored_bundle_fails_by_name(tmp_path: Path, bundle: Make, saved: Saved) -> None:
    folder = doctored(bundle(SHAPE, "cpu", "none"), tmp_path / "bundle")
    limits = Thresholds(mean_difference=1e-4, max_difference=1e-3, kl=1e-6, perplexity_ratio=1.0001)
    report = verify_golden(folder, saved("none")[0], thresholds=limits)
    names = ["mean_difference", "max_difference", "kl", "perplexity_ratio"]
    assert [failure.split()[0] for failure in report.failures] == names
    nan = doctored(bundle(SHAPE, "cpu", "none"), tmp_path / "nan", scale=np.nan)
    report = verify_golden(nan, saved("none")[0], thresholds=limits)
    assert [failure.split()[0] for failure in report.failures] == names
    assert report.greedy["agreeing"] == 0


def test_the_command_needs_neither_pytorch_nor_the_checkpoint(tmp_path: Path, bundle: Make, saved: Saved) -> None:
    folder = shutil.copytree(bundle(SHAPE, "cpu", "int4"), tmp_path / "bundle")
    loose = ["--max-kl", "0.5", "--max-kernel-kl", "0.1", "--max-perplexity-ratio", "1.2"]
    arguments = [str(folder), "--golden", str(saved("int4")[0]), *loose]
    code = f"""
import sys
for name in ("torch", "safetensors", "onnx", "onnx_ir", "onnxscript", "psutil", "filelock", "huggingface_hub"):
    sys.modules[name] = None  # importing it now raises ModuleNotFoundError
from phimoe_onnx.cli.verify import main
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "passed" in done.stdout
    digest = read_golden(saved("int4")[0]).header.checkpoint_sha256
    assert f"the checkpoint's SHA-256 is {digest}" in " ".join(done.stdout.split())
    parity = read_manifest(folder).parity
    assert parity is not None
    assert (parity["passed"], parity["tokens"], len(parity["notes"])) == (True, 200, 2)


def test_the_file_is_a_safetensors_file(bundle: Make, checkpoint: Make, saved: Saved) -> None:
    file, full = saved("int4")
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    header = json.loads(metadata["golden"])
    assert metadata["written_by"] == "phimoe-verify"
    assert (header["format_version"], header["windows"], header["new_tokens"]) == (1, [100, 100], 20)
    assert header["perplexity"] == full.perplexity["reference"]
    assert header["config"]["vocab_size"] == 2048
    files = ["config.json", "model.safetensors"]
    lines = [f"{hashlib.sha256((checkpoint(SHAPE) / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    assert header["checkpoint_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    shapes = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    logits = {"top_logits": ("float32", (200, TOP)), "sampled_logits": ("float32", (200, SAMPLED))}
    logits["logsumexp"] = ("float64", (200,))
    assert shapes == {
        "token_ids": ("int32", (200,)),
        "routing": ("int16", (2, 200, 2)),
        "greedy": ("int32", (min(full.greedy["agreeing"] + 1, 20),)),
        "top_ids": ("int32", (200, TOP)),
        "stored_best": ("int32", (200,)),
        **logits,
        **{f"stored_{name}": shape for name, shape in logits.items()},
    }
    assert file.stat().st_size < 400_000


def damaged(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return apply


def with_header(**values: Any) -> Callable[[Path], None]:
    """Another header under a right SHA-256."""

    def apply(path: Path) -> None:
        data = path.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8:end])
        text = json.dumps(json.loads(entries["__metadata__"]["golden"]) | values)
        entries["__metadata__"]["golden"] = text
        entries["__metadata__"]["sha256"] = hashlib.sha256(text.encode() + data[end:]).hexdigest()
        header = json.dumps(entries, separators=(",", ":")).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "cannot be read (No such file or directory)"),
        (lambda path: path.write_bytes(b""), "is no golden file; phimoe-verify --save-golden writes one"),
        (lambda path: path.write_text("{}"), "is no golden file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        (damaged(lambda data: data.__delitem__(slice(-100, None))), "is damaged"),
        (damaged(lambda data: data.__delitem__(slice(300, None))), "is damaged"),
        (
            damaged(lambda data: data.__setitem__(-5, data[-5] ^ 1)),
            "is damaged (its SHA-256 is not",
        ),
        (damaged(lambda data: data.__setitem__(data.index(b"windows"), ord("v"))), "is damaged"),
        (damaged(lambda data: data.__setitem__(data.index(b"F32"), ord("Q"))), "is damaged"),
        (with_header(format_version=2), "format_version is 2, this release reads 1; upgrade phimoe-onnx"),
        (with_header(windows=[100, 101]), "is damaged (token_ids is int32 [200], expected I32 [201]"),
        (with_header(windows=[100, "a"]), "is damaged (Expected `int`, got `str`"),
        (with_header(scales=[1.0, 0.0]), "is damaged (scales are [1.0, 0.0], expected 2 positive numbers"),
        (with_header(perplexity=None), "is damaged (perplexity is None of text-generation"),
        (with_header(config={"vocab_size": 99, "num_hidden_layers": 2}), "is damaged (token_ids holds ids outside"),
        (with_header(task="feature-extraction"), "is damaged"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path,
    bundle: Make,
    saved: Saved,
    damage: Callable[[Path], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = Path(shutil.copy(saved("none")[0], tmp_path / "golden"))
    damage(file)
    assert main([str(bundle(SHAPE, "cpu", "none")), "--golden", str(file)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {file}: {words}"), errors
    assert errors.count("\n") == 1


def test_another_checkpoints_file_is_refused(bundle: Make, saved: Saved) -> None:
    file, _ = saved("none")
    digest = read_golden(file).header.checkpoint_sha256
    with pytest.raises(PhiMoEError) as error:
        verify_golden(bundle("plain", "cpu", "none"), file)
    assert str(error.value).startswith(f"{file}: is of the checkpoint {SHAPE} (SHA-256 {digest}), whose bundle has ")
    assert "intermediate_size 128, not 96" in str(error.value)
    with pytest.raises(PhiMoEError, match=r"has the task text-generation, not feature-extraction"):
        verify_golden(bundle(SHAPE, "cpu", "none", "feature-extraction"), file)


def test_the_divergence_is_estimated_and_exact_where_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    expected = (3 * random.normal(size=(300, 500))).astype(np.float32)
    expected[7, 3:9] = expected[7].max() + 1  # a tie of the best
    logits = expected + (0.1 * random.normal(size=(300, 500))).astype(np.float32)
    full = Comparison()
    full.add(logits, expected)
    assert full.kl is not None
    found = []
    for top in (8, 64, 500):
        monkeypatch.setattr(golden, "TOP", top)
        monkeypatch.setattr(golden, "SAMPLED", top)
        ids, comparison = top_ids(expected), Comparison()
        assert all(len(set(row)) == top for row in ids.tolist())
        assert np.array_equal(ids[:, 0], expected.argmax(axis=-1))
        compare(comparison, logits, seen(expected, ids, 11), ids, 11, float(expected.std()))
        found.append(comparison)
    assert found[0].kl == pytest.approx(full.kl, rel=0.1)
    assert found[1].kl == pytest.approx(full.kl, rel=0.01)
    assert found[2].kl == pytest.approx(full.kl, rel=1e-4)
    assert found[1].mean_difference == pytest.approx(full.mean_difference, rel=0.02)
    assert found[2].mean_difference == pytest.approx(full.mean_difference, rel=1e-5)
    assert found[2].max_difference == pytest.approx(full.max_difference, rel=1e-5)
    assert [each.top1_agreement for each in found] == [full.top1_agreement] * 3
    none = Comparison()
    compare(none, expected, seen(expected, ids, 0), ids, 0, 1.0)
    assert (none.max_difference, none.mean_difference, none.top1_agreement) == (0, 0, 1)
    assert none.kl == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("vocab", [7, 32, 2048, 32064])
def test_the_samples_visit_every_column(vocab: int) -> None:
    count = min(SAMPLED, vocab)
    sampled = columns(0, vocab // count + count, vocab)
    assert all(len(set(row)) == count for row in sampled.tolist())
    assert set(sampled.flatten().tolist()) == set(range(vocab))
    assert np.array_equal(columns(5, 3, vocab), sampled[5:8])


def test_the_command_saves_and_refuses_what_does_not_fit(
    tmp_path: Path, bundle: Make, checkpoint: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(shutil.copytree(bundle("plain", "cpu", "none"), tmp_path / "bundle"))
    file, other = tmp_path / "model.golden", tmp_path / "notes.txt"
    arguments = [folder, "--reference", str(checkpoint("plain")), "--tokens", "20", "--new-tokens", "3"]
    assert main([*arguments, "--save-golden", str(file)]) == 0
    assert main([*arguments, "--save-golden", str(file)]) == 0  # over its own
    assert main([folder, "--golden", str(file)]) == 0
    capsys.readouterr()
    other.write_text("mine")
    for options, words in (
        ([*arguments, "--save-golden", str(other)], f"{other}: exists and is no earlier report"),
        ([*arguments, "--save-golden", str(tmp_path)], f"{tmp_path}: is a folder"),
        ([folder, "--golden", str(file), "--tokens", "9"], "--tokens goes with --reference; --golden has its own text"),
        ([folder, "--golden", str(file), "--save-golden", str(file)], "--save-golden goes with --reference"),
    ):
        assert main(options) == 1
        assert capsys.readouterr().err.startswith(f"error: {words}")
    assert other.read_text() == "mine"
    with pytest.raises(SystemExit):
        main([*arguments, "--golden", str(file)])
    with pytest.raises(SystemExit):
        main([folder])
