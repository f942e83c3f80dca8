"""A bundle that another process replaces while it is loaded: one bundle is loaded, or it is said that it changed."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phimoe_onnx import bundle as bundles
from phimoe_onnx.errors import BundleError
from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.exporter.staging import Journal, staged
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import SHAPES, random_ids, write_checkpoint

CHANGED = "was changed while it was read; try again"


@pytest.fixture(scope="module")
def two(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles that no size tells from each other."""
    folder = tmp_path_factory.mktemp("two")
    other = write_checkpoint(folder / "plain", seed=5, **SHAPES["plain"])
    return bundle("plain", "cpu", "none"), export(other, folder / "bundle")


@pytest.fixture(autouse=True)
def no_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for files of gigabytes, whose sizes alone are checked at a load."""
    monkeypatch.setattr(bundles, "HASH_LIMIT", -1)


class AtOpening:
    """Calls a function just before the n-th file is opened, or a folder listed, from now on."""

    def __init__(self) -> None:
        self.left, self.call = 0, lambda: None
        sys.addaudithook(self._hook)  # stays for the life of the process

    def __call__(self, step: int, call: Callable[[], None]) -> None:
        """Arms it; `left` is 0 when it was called."""
        self.left, self.call = step, call

    def _hook(self, event: str, _: Any) -> None:
        if self.left and event in ("open", "os.listdir", "os.scandir"):
            self.left -= 1
            if not self.left:
                self.call()


def tokens(bundle: Path) -> list[int]:
    return PhiMoE.load(bundle, threads=1).generate(random_ids(9), max_new_tokens=8).token_ids


@pytest.mark.parametrize("left", [True, False])
def test_a_bundle_that_is_replaced_at_any_step(tmp_path: Path, two: tuple[Path, Path], left: bool) -> None:
    """`left`: whether the old one is still being removed when it is read, or is gone at once."""
    expected = [tokens(folder) for folder in two]
    assert expected[0] != expected[1]
    before = AtOpening()
    said, step = 0, 0
    while True:
        step += 1
        output, aside = tmp_path / str(step) / "bundle", tmp_path / str(step) / "aside"
        old, new = (
            shutil.copytree(folder, tmp_path / str(step) / name) for folder, name in zip(two, "ab", strict=True)
        )
        old.rename(output)

        def replace(output: Path = output, aside: Path = aside, new: Path = new) -> None:
            output.rename(aside)
            new.rename(output)
            if not left:
                shutil.rmtree(aside)

        before(step, replace)
        try:
            found = tokens(output)
        except BundleError as error:
            assert CHANGED in str(error)  # noqa: PT017
            said += 1
        else:
            assert found in expected
        if before.left:
            break
    before.left = 0
    assert said > 5


def test_the_manifest_may_be_written_again_meanwhile(
    tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As phimoe-verify does with its summary."""
    folder = Path(shutil.copytree(two[0], tmp_path / "bundle"))
    check = bundles.check_files

    def check_and_record(bundle: Path, manifest: bundles.Manifest) -> None:
        check(bundle, manifest)
        bundles.record(bundle, "parity", {"passed": True})

    monkeypatch.setattr("phimoe_onnx.runtime.model.check_files", check_and_record)
    assert tokens(folder) == tokens(two[0])


def test_an_error_that_has_another_cause_keeps_it(tmp_path: Path, two: tuple[Path, Path]) -> None:
    folder = Path(shutil.copytree(two[0], tmp_path / "bundle"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: is missing"):
        PhiMoE.load(folder)


def replace_again_and_again(output: Path, bundles: tuple[Path, Path], times: int) -> None:
    for number in range(times):
        with staged(output, overwrite=True) as folder:
            Journal(folder, "").close()
            shutil.copytree(bundles[number % 2], folder, dirs_exist_ok=True)


def test_loads_beside_a_process_that_replaces_the_bundle(tmp_path: Path, two: tuple[Path, Path]) -> None:
    output = Path(shutil.copytree(two[0], tmp_path / "bundle"))
    expected = [tokens(folder) for folder in two]
    process = multiprocessing.get_context("spawn").Process(target=replace_again_and_again, args=(output, two, 60))
    process.start()
    loaded = []
    while process.is_alive() or not loaded:
        try:
            loaded.append(tokens(output))
        except BundleError as error:
            said = str(error)
            assert CHANGED in said or "not a bundle" in said
    process.join()
    assert process.exitcode == 0
    assert all(found in expected for found in loaded)
