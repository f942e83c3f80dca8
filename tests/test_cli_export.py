"""phimoe-export as a process would see it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx.bundle import describe_files, read_manifest
from phimoe_onnx.checkpoint.tensors import SINGLE
from phimoe_onnx.cli import optimum_export
from phimoe_onnx.cli.export import main
from phimoe_onnx.exporter import recipe
from phimoe_onnx.operators import library
from tests.checkpoints import BASE, write_checkpoint

Bundle = Callable[[str, str, str], Path]
Checkpoint = Callable[[str], Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4825360\n"


def test_it_says_where_the_bundle_is(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    assert main([str(checkpoint("plain")), "-o", str(output), "--quantize", "int4", "--operators", "stock"]) == 0
    out, errors = capsys.readouterr()
    size = sum(path.stat().st_size for path in output.iterdir())
    assert out.startswith(f"{output}: {size / 1e6:.1f} MB in ")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:-2]}
    assert rows["experts"][1:4] == ["int4,", "block", "32"]
    assert sum(float(row[-2]) for row in rows.values() if row[0] != "rope") == pytest.approx(
        _data_bytes(output) / 1e6, abs=0.1
    )
    assert re.fullmatch(
        r"reading .* s, tracing .* s, writing weights .* s, hashing .* s; peak memory \d\.\d\d GiB",
        out.splitlines()[-2],
    )
    assert out.splitlines()[-1].startswith("stock operators: any ONNX Runtime runs it")
    assert "error" not in errors
    assert describe_files(output) == describe_files(bundle("plain", "cpu", "int4"))


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ([], "phimoe-export {output} --operators stock makes one of it for plain ONNX Runtime"),
        (
            ["--quantize", "int3"],
            "plain ONNX Runtime takes no such weights or cache: export the checkpoint with {stock}",
        ),
        (
            ["--kv-cache", "fp16"],
            "plain ONNX Runtime takes no such weights or cache: export the checkpoint with {stock}",
        ),
    ],
    ids=["int4", "int3", "a cache of float16"],
)
def test_it_says_how_to_get_the_other_operators(
    tmp_path: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], options: list[str], other: str
) -> None:
    output = tmp_path / "bundle"
    words = [str(checkpoint("plain")), "-o", str(output), "--quantize", "int4", "--operators", "native", *options]
    assert main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("run it; " + other.format(output=output, stock="--operators stock"))
    assert main([str(output), "-o", str(tmp_path / "other"), "--operators", "stock"]) == int(bool(options))


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_by_default_the_operators_are_native_where_their_library_is(
    tmp_path: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], quantize: str
) -> None:
    kind, output = "stock" if library() is None else "native", tmp_path / "bundle"
    words = [str(checkpoint("plain")), "-o", str(output), "--overwrite", "--quantize", quantize]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{kind} operators: ")
    requires = ("phimoe.native.1",) if kind == "native" else ()
    assert {graph.requires for graph in read_manifest(output).graphs} == {requires}
    by_default = describe_files(output)
    assert main([*words, "--operators", kind]) == 0
    assert describe_files(output) == by_default


def test_without_their_library_a_line_says_why_the_operators_are_stock(
    tmp_path: Path,
    checkpoint: Checkpoint,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(recipe, "library", lambda: None)
    words = [str(checkpoint("plain")), "-o", str(tmp_path / "bundle"), "--overwrite", "--quantize", "int4"]
    assert main(words) == 0
    assert [record.message for record in caplog.records] == [recipe.NO_LIBRARY]
    assert describe_files(tmp_path / "bundle") == describe_files(bundle("plain", "cpu", "int4"))
    caplog.clear()
    assert main([*words, "--operators", "stock"]) == 0
    assert not caplog.records


def _data_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.data"))


def test_its_options_reach_the_bundle(tmp_path: Path, checkpoint: Checkpoint) -> None:
    output = tmp_path / "bundle"
    assert main([str(checkpoint("plain")), "-o", str(output), "--quantize", "int8", "--block-size", "16"]) == 0
    manifest = read_manifest(output)
    assert (manifest.target, manifest.quantize) == ("cpu", "int8")
    assert {group.block_size for group in manifest.weights if group.dtype == "int8"} == {16}
    assert main([str(checkpoint("plain")), "--output", str(output), "--target", "portable", "--overwrite"]) == 0
    manifest = read_manifest(output)
    assert (manifest.target, manifest.quantize) == ("portable", "none")


def config(**changes: object) -> Callable[[Path], object]:
    """Writes another config.json."""
    return lambda folder: (folder / "config.json").write_text(json.dumps(BASE | changes))


def truncated(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text(POINTER), "config.json: is a Git LFS pointer"),
        (
            config(model_type="mixtral", architectures=["MixtralForCausalLM"]),
            "model_type is 'mixtral', expected 'phimoe'",
        ),
        (config(num_experts_per_tok=3), "num_experts_per_tok is 3"),
        (config(num_hidden_layers=3), "lacks the tensor model.layers.2."),
        (config(intermediate_size=80), "has the shape [96, 64]"),
        (config(lm_head_bias=False), "lm_head.bias (1 such)"),
        (truncated, "model.safetensors: is truncated"),
        (lambda folder: (folder / SINGLE).write_text(POINTER), "model.safetensors: is a Git LFS pointer"),
        (lambda folder: (folder / SINGLE).unlink(), "only safetensors checkpoints are read"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_a_bad_checkpoint_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    damage(folder)
    assert_fails(capsys, [str(folder), "-o", str(tmp_path / "bundle")], message)
    assert not list(tmp_path.glob("*bundle*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CHECKPOINT", "--quantize", "int4", "--block-size", "64"], "choose from [16, 32]"),
        (["CHECKPOINT", "--quantize", "int2", "--target", "portable"], "use none or fp16 or int8 or int4"),
        (["CHECKPOINT", "-o", "EXISTING"], "exists already; name another --output, or pass --overwrite"),
        (["CHECKPOINT", "-o", "EXISTING", "--overwrite"], "is no bundle, so --overwrite leaves it alone"),
        (["CHECKPOINT", "-o", "FILE/bundle"], "cannot be written"),
        (["FILE"], "is a file, expected the folder of a checkpoint"),
    ],
)
def test_a_bad_option_is_one_sentence(
    tmp_path: Path,
    checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    (tmp_path / "file").write_text("")
    names = {
        "CHECKPOINT": str(checkpoint("plain")),
        "EXISTING": "existing",
        "FILE": "file",
        "FILE/bundle": "file/bundle",
    }
    assert_fails(capsys, [names.get(argument, argument) for argument in arguments], message)
    assert {path.name for path in tmp_path.iterdir()} == {"existing", "file"}


def assert_fails(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(("command", "noted"), [("onnx", True), ("openvino", False)])
def test_a_release_of_optimum_without_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, noted: bool
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.commands.export.onnx", None)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", command])
    optimum_export.register()
    assert ("this release of optimum cannot export a PhiMoE" in capsys.readouterr().err) is noted
