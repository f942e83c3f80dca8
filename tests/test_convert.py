"""Bundles from bundles: the same bytes as from the checkpoint, there and back, and refused where they cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phimoe_onnx import BundleError, ExportError, convert, export
from phimoe_onnx.cli.export import main
from tests.checkpoints import SHAPES, write_checkpoint

STORE = {"lm_head.weight": "fp16", "model.layers.0.self_attn*": "int8", "*.down_proj": "int8"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles "native" and "stock" of one checkpoint."""
    folder = tmp_path_factory.mktemp("bundles")
    source = write_checkpoint(folder / "checkpoint", **SHAPES["longrope-window"])
    for operators in ("native", "stock"):
        options: dict[str, Any] = {"operators": operators, "kv_cache": "int8", "store": STORE}
        export(source, folder / operators, quantize="int4", **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_same(found: Path, expected: Path) -> None:
    ours, theirs = contents(found), contents(expected)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize(("source", "operators"), [("stock", "native"), ("native", "stock")])
def test_it_is_the_bundle_that_the_checkpoint_gives(bundles: Path, tmp_path: Path, source: str, operators: str) -> None:
    before = contents(bundles / source)
    folder = convert(bundles / source, tmp_path / "bundle", operators=operators)
    check_same(folder, bundles / operators)
    assert contents(bundles / source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_there_and_back_in_blocks_of_16(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"quantize": "int4", "block_size": 16, "operators": "stock"}
    stock = export(checkpoint("tied"), tmp_path / "stock", **options)
    native = convert(stock, tmp_path / "native", operators="native")
    check_same(convert(native, tmp_path / "again", operators="stock", block_size=16), stock)


def test_a_default_int4_bundle_becomes_native_and_is_itself_again(
    tmp_path: Path, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, stock = checkpoint("tiles"), tmp_path / "stock"  # rows that blocks of 64 would divide, too
    assert main([str(source), "-o", str(stock), "--quantize", "int4", "--operators", "stock"]) == 0
    native, again = tmp_path / "native", tmp_path / "again"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"; phimoe-export {stock} --operators native makes one of it for this package")
    assert main([str(stock), "-o", str(native)]) == 0  # the other kind
    check_same(native, export(source, tmp_path / "exported", quantize="int4", operators="native"))
    assert main([str(native), "-o", str(again)]) == 0
    check_same(again, stock)


def test_a_killed_conversion_goes_on(bundles: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "writing weights" and 3 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(bundles / "stock", tmp_path / "bundle", operators="native", progress=interrupt)
    assert not (tmp_path / "bundle").exists()
    convert(
        bundles / "stock",
        tmp_path / "bundle",
        operators="native",
        progress=lambda phase, done, total: seen.append(done) if phase == "writing weights" else None,
    )
    assert seen[0] > 0  # found written
    check_same(tmp_path / "bundle", bundles / "native")


@pytest.mark.parametrize("options", [{"quantize": "int4", "rounding": "rtn"}, {"quantize": "int8"}])
def test_rounding_to_nearest_is_refused(
    tmp_path: Path, checkpoint: Callable[..., Path], options: dict[str, Any]
) -> None:
    stock = export(checkpoint("plain"), tmp_path / "stock", operators="stock", **options)
    words = r"rounded to nearest, .* two-level grid .* the checkpoint with --operators native, or with --rounding two-l"
    with pytest.raises(ExportError, match=words):
        convert(stock, tmp_path / "native", operators="native")
    assert [path.name for path in tmp_path.iterdir() if path.name != "stock"] == []


def changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.update(target="portable"), r"--target portable; only bundles for cpu"),
        (lambda values: [group.update(block_size=64) for group in blocks(values)], r"blocks of 64, .*two-level grid"),
        (lambda values: [group.update(symmetric=False) for group in blocks(values)], r"zero points, .*two-level grid"),
        (lambda values: [group.update(dtype="int2") for group in blocks(values)], r"is int2, .*levels of its own"),
    ],
)
def test_what_is_on_no_grid_is_refused_before_any_work(
    bundles: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    source = changed(bundles / "stock", tmp_path / "source", change)
    phases: list[str] = []
    with pytest.raises(ExportError, match=words):
        convert(source, tmp_path / "out", operators="native", progress=lambda phase, *_: phases.append(phase))
    assert phases == ["reading"]


def blocks(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in values["weights"] if group["block_size"]]


def test_its_own_operators_are_refused(bundles: Path, tmp_path: Path) -> None:
    for operators, other in (("native", "stock"), ("stock", "native")):
        with pytest.raises(ExportError, match=f"has {operators} operators already; --operators {other}"):
            convert(bundles / operators, tmp_path / "out", operators=operators)
    with pytest.raises(ExportError, match="is the bundle that is to be converted; name another --output"):
        convert(bundles / "stock", bundles / "stock", operators="native", overwrite=True)


def test_a_damaged_bundle_is_named(bundles: Path, tmp_path: Path) -> None:
    source = shutil.copytree(bundles / "native", tmp_path / "source")
    data = source / "model.data"
    whole = data.read_bytes()
    for damaged, words in (
        (whole[:-1], rf"has {len(whole) - 1} bytes, the manifest says"),
        (b"\1" + whole[1:], "SHA-256"),
    ):
        data.write_bytes(damaged)
        with pytest.raises(BundleError, match=rf"model\.data: .*{words}.*again"):
            convert(source, tmp_path / "out", operators="stock")
    data.unlink()
    with pytest.raises(BundleError, match=r"model\.data: is missing"):
        convert(source, tmp_path / "out", operators="stock")
    assert not (tmp_path / "out").exists()


def test_the_command(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(bundles / "stock"), tmp_path / "bundle"
    assert main([source, "-o", str(out), "--operators", "native", "--quantize", "int8", "--kv-cache", "int4"]) == 1
    assert "--quantize, --kv-cache: is for checkpoints, but" in capsys.readouterr().err
    assert main([source, "-o", str(out), "--operators", "native"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("native operators: ")
    assert f"phimoe-export {out} --operators stock" in last
    assert main([source, "-o", str(out), "--operators", "native"]) == 1
    assert "exists already" in capsys.readouterr().err
    check_same(out, bundles / "native")
