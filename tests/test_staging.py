"""The staging folder: its journal, and what a kill or a failure leaves at any step."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx import bundle
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.staging import JOURNAL, Journal, check_output, staged

OLD, NEW = "the old bundle", "the new bundle"
CACHE = bundle.CacheShape(num_hidden_layers=1, num_key_value_heads=1, head_dim=16, dtype="float32", shared=True)
DECODING = bundle.Decoding(8, 8, None, 8, (1,), {}, CACHE)


def write_bundle(output: Path, text: str) -> None:
    """All that an export does on the disk, with little in it."""
    check_output(output, overwrite=True)
    with staged(output, overwrite=True) as folder:
        for name in ("model.onnx", "tokenizer.json"):
            (folder / name).write_text(text)
        journal = Journal(folder, text)
        for job in range(2):
            with (folder / "model.data").open("ab") as file:
                file.write(text.encode())
            journal.add(job)
        journal.close()
        files = bundle.describe_files(folder)
        bundle.Manifest(
            tool_version="0",
            source=text,
            task="text-generation",
            target="cpu",
            quantize="none",
            dtype="float32",
            weights=(),
            graphs=(bundle.Graph("model.onnx", {"cpu": "1.29"}),),
            decoding=DECODING,
            files=files,
        ).write(folder)


def whole(output: Path) -> str:
    """Which of the bundles this is, with every byte of it checked."""
    manifest = bundle.read_manifest(output)
    bundle.check_files(output, manifest, hash_everything=True)
    assert {path.name for path in output.iterdir()} == {*manifest.files, bundle.MANIFEST}
    return manifest.source


def killed_at(step: int, call: Callable[[], object]) -> bool:
    """Runs `call` in a process that is killed before its n-th operation on files; False if it ended before."""
    child = os.fork()
    if child == 0:
        steps = 0

        def kill(event: str, _: object) -> None:
            nonlocal steps
            if event == "open" or event.startswith(("os.", "shutil.")):
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(kill)
            call()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_at_any_step(tmp_path: Path, exists: bool) -> None:
    step, states = 1, set()
    while True:
        folder = tmp_path / str(step)
        output = folder / "bundle"
        if exists:
            write_bundle(output, OLD)
        if not killed_at(step, lambda: write_bundle(output, NEW)):  # noqa: B023
            break
        states.add(whole(output) if output.exists() else "")
        write_bundle(output, NEW)
        assert whole(output) == NEW
        assert [path.name for path in folder.iterdir()] == ["bundle"]
        step += 1
    assert step > 20
    assert states == ({OLD, "", NEW} if exists else {"", NEW})  # "": between the two renames


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kill_after_kill(tmp_path: Path) -> None:
    """Each run goes on with what the killed one before left, and gets a step further."""
    output = tmp_path / "bundle"
    write_bundle(output, OLD)
    step = 1
    while killed_at(step, lambda: write_bundle(output, NEW)):
        assert not output.exists() or whole(output) in (OLD, NEW)
        step += 1
    assert whole(output) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_kill_between_the_renames_is_made_good_before_anything_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, step = tmp_path / "bundle", 1
    write_bundle(output, OLD)
    while output.exists():
        killed_at(step, lambda: write_bundle(output, NEW))
        step += 1
    with pytest.raises(ExportError, match="exists already"):
        check_output(output, overwrite=False)
    assert whole(output) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert "was killed while it replaced this bundle; the new one is now in place" in caplog.text


def test_a_rename_that_fails_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, rename = tmp_path / "bundle", Path.rename
    write_bundle(output, OLD)

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ExportError, match=r"bundle: cannot be written \(Permission denied\)"):
        write_bundle(output, NEW)
    assert whole(output) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_another_export_left_is_not_in_the_bundle(tmp_path: Path) -> None:
    left = tmp_path / ".bundle.partial"
    left.mkdir()
    for name in ("model.branches.onnx", "model.data", "model.1.data", "chat_template.jinja", bundle.MANIFEST, JOURNAL):
        (left / name).write_text("stale")
    write_bundle(tmp_path / "bundle", NEW)
    assert whole(tmp_path / "bundle") == NEW


def test_a_bundle_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    check_output(output, overwrite=False)
    write_bundle(output, OLD)
    with pytest.raises(ExportError, match="exists already"), staged(output, overwrite=False):
        pass
    assert whole(output) == OLD


def test_a_journal_whose_last_line_was_cut_short(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "plan")
    for job in (3, 14):
        journal.add(job)
    journal.close()
    before = (tmp_path / JOURNAL).read_text()
    (tmp_path / JOURNAL).write_text(before + "1")
    journal = Journal(tmp_path, "plan")
    journal.add(7)
    journal.close()
    assert journal.done == {3, 14}
    assert (tmp_path / JOURNAL).read_text() == before + "7\n"


@pytest.mark.parametrize("changed", ["plan", "boot"])
def test_a_journal_of_another_plan_or_boot_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    journal = Journal(tmp_path, "plan")
    journal.add(3)
    journal.close()
    (tmp_path / "model.data").write_bytes(b"stale")
    if changed == "boot":
        boot = tmp_path.parent / f"{tmp_path.name}-boot"
        boot.write_text("another\n")
        monkeypatch.setattr("phimoe_onnx.exporter.staging.BOOT", boot)
    journal = Journal(tmp_path, "other" if changed == "plan" else "plan")
    journal.close()
    assert journal.done == set()
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]
