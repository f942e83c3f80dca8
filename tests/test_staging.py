"""The staging folder: its journal, and what a kill or a failure leaves at any step."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx import bundle
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter import rename
from phimoe_onnx.exporter.rename import exchange, rename_new
from phimoe_onnx.exporter.staging import JOURNAL, MARK, Journal, check_output, staged

OLD, NEW = "the old bundle", "the new bundle"
CACHE = bundle.CacheShape(num_hidden_layers=1, num_key_value_heads=1, head_dim=16, dtype="float32", shared=True)
DECODING = bundle.Decoding(8, 8, None, 8, (1,), {}, CACHE)


def write_bundle(
    output: Path, text: str, overwrite: bool = True, during: Callable[[Path], object] = lambda _: None
) -> None:
    """All that an export does on the disk, with little in it; `during` is called with the staging folder at the end."""
    check_output(output, overwrite)
    with staged(output, overwrite) as folder:
        fill(folder, text)
        during(folder)


def fill(folder: Path, text: str) -> None:
    """Writes a bundle's files into the staging folder."""
    for name in ("model.onnx", bundle.TOKENIZER):
        (folder / name).write_text(text)
    journal = Journal(folder, text)
    for job in range(2):
        with (folder / "model.data").open("ab") as file:
            file.write(text.encode())
        journal.add(job)
    journal.close()
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
        files=bundle.describe_files(folder),
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


@pytest.fixture(params=["exchange", "two renames"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """With what the system has for it, and as on a file system that has nothing."""
    if request.param == "two renames":
        monkeypatch.setattr(rename, "_rename", lambda *_, **__: False)
    elif not exchanges(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    return str(request.param)


def exchanges(folder: Path) -> bool:
    """Whether the file system can exchange two names."""
    first, second = folder / "first", folder / "second"
    first.mkdir()
    second.mkdir()
    exchanged = exchange(first, second)
    first.rmdir()
    second.rmdir()
    return exchanged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_at_any_step(tmp_path: Path, renames: str, exists: bool) -> None:
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
    between = {""} if renames == "two renames" else set()
    assert states == ({OLD, NEW} | between if exists else {"", NEW})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.usefixtures("renames")
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


def killed_between_the_renames(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rename, "_rename", lambda *_, **__: False)
    write_bundle(output, OLD)
    step = 1
    while output.exists():
        killed_at(step, lambda: write_bundle(output, NEW))
        step += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_kill_between_the_renames_is_made_good_before_anything_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    killed_between_the_renames(output, monkeypatch)
    with pytest.raises(ExportError, match="exists already"):
        check_output(output, overwrite=False)
    assert whole(output) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert "was killed while it replaced this bundle; the new one is now in place" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_what_comes_between_the_renames_costs_neither_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "bundle"
    killed_between_the_renames(output, monkeypatch)
    make(output / "precious")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="has come here while an export was replacing the bundle"):
            check_output(output, overwrite)
    assert (output / "precious").read_text() == "keep"
    assert whole(tmp_path / ".bundle.replaced") == OLD
    assert whole(tmp_path / ".bundle.partial") == NEW


def test_a_rename_that_fails_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, plain = tmp_path / "bundle", os.rename
    write_bundle(output, OLD)

    def fail(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        plain(source, target)

    monkeypatch.setattr(rename, "_rename", lambda *_, **__: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ExportError, match=r"bundle: cannot be written \(Permission denied\)"):
        write_bundle(output, NEW)
    assert whole(output) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_another_export_left_is_not_in_the_bundle(tmp_path: Path) -> None:
    left = tmp_path / ".bundle.partial"
    left.mkdir()
    for name in ("model.branches.onnx", "model.data", "model.1.data", "chat_template.jinja", bundle.MANIFEST):
        (left / name).write_text("stale")
    (left / JOURNAL).write_bytes(MARK + b" plan\n0\n")
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


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\x00\n", b"two\n", "\u00b2\n".encode(), b"9" * 5000 + b"\n", b"-1\n", b"1 2\n", b"\n"]
)
def test_a_damaged_journal_counts_for_nothing(tmp_path: Path, damage: bytes) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        write_bundle(output, "plan", during=interrupt)
    path = tmp_path / ".bundle.partial" / JOURNAL
    path.write_bytes(path.read_bytes() + damage)
    with staged(output) as folder:
        journal = Journal(folder, "plan")
        journal.close()
        assert journal.done == set()
        assert not (folder / "model.data").exists()
        fill(folder, NEW)
    assert whole(output) == NEW


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", [None, 3])
def test_a_journal_whose_data_is_gone_counts_for_nothing(tmp_path: Path, size: int | None) -> None:
    """Else the jobs that it names would be left out, and their weights be zeros."""
    data = tmp_path / "model.data"
    journal = Journal(tmp_path, "plan", {"model.data": 4})
    data.write_text("data")
    journal.add(0)
    journal.close()
    journal = Journal(tmp_path, "plan", {"model.data": 4})
    journal.close()
    assert journal.done == {0}
    data.unlink()
    if size is not None:
        data.write_bytes(bytes(size))
    journal = Journal(tmp_path, "plan", {"model.data": 4})
    journal.close()
    assert journal.done == set()


@pytest.mark.parametrize("length", range(len(MARK) + 1))
def test_a_mark_that_was_cut_short(tmp_path: Path, length: int) -> None:
    partial = tmp_path / ".bundle.partial"
    partial.mkdir()
    (partial / JOURNAL).write_bytes(MARK[:length])
    write_bundle(tmp_path / "bundle", NEW)
    assert whole(tmp_path / "bundle") == NEW


# What is the user's. Each of these is tried at a name that the export would use, and must be there afterwards.


def make(path: Path) -> None:
    """A file of the user's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("keep")


def folder_with_a_file(path: Path) -> None:
    make(path / "precious.txt")


def folder_that_looks_like_a_staging_folder(path: Path) -> None:
    for name in ("model.data", "model.onnx", "manifest.json"):
        make(path / name)


def folder_with_a_journal_of_another(path: Path) -> None:
    make(path / JOURNAL)
    make(path / "model.data")


def link_to_a_file(path: Path) -> None:
    make(path.parent / "theirs" / "file")
    path.symlink_to(path.parent / "theirs" / "file")


def link_to_a_folder(path: Path) -> None:
    make(path.parent / "theirs" / "model.data")
    path.symlink_to(path.parent / "theirs")


def link_to_a_bundle(path: Path) -> None:
    write_bundle(path.parent / "theirs", OLD)
    path.symlink_to(path.parent / "theirs")


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


def write_elsewhere(path: Path) -> None:
    write_bundle(path.parent / "elsewhere" / path.name, OLD)
    (path.parent / "elsewhere" / path.name).rename(path)


def bundle_with_a_file(path: Path) -> None:
    write_elsewhere(path)
    make(path / "notes.txt")


def bundle_with_a_folder(path: Path) -> None:
    write_elsewhere(path)
    make(path / "model" / "model.data")


def bundle_with_a_link(path: Path) -> None:
    write_elsewhere(path)
    make(path.parent / "theirs" / "model.data")
    (path / "model.data").unlink()
    (path / "model.data").symlink_to(path.parent / "theirs" / "model.data")


def bundle_whose_manifest_is_a_link(path: Path) -> None:
    write_elsewhere(path)
    (path / bundle.MANIFEST).rename(path.parent / "manifest")
    (path / bundle.MANIFEST).symlink_to(path.parent / "manifest")


def marked(path: Path) -> None:
    make(path / "model.data")
    (path / JOURNAL).write_bytes(MARK + b"\n")


def marked_with_a_file(path: Path) -> None:
    marked(path)
    make(path / "notes.txt")


def marked_with_a_link(path: Path) -> None:
    marked(path)
    make(path.parent / "theirs" / "file")
    (path / "model.1.data").symlink_to(path.parent / "theirs" / "file")


def marked_by_a_link(path: Path) -> None:
    marked(path)
    (path / JOURNAL).rename(path.parent / "journal")
    (path / JOURNAL).symlink_to(path.parent / "journal")


THINGS: list[Callable[[Path], None]] = [
    make,
    folder_with_a_file,
    folder_that_looks_like_a_staging_folder,
    folder_with_a_journal_of_another,
    link_to_a_file,
    link_to_a_folder,
    link_to_a_bundle,
    link_to_nothing,
    bundle_with_a_file,
    bundle_with_a_folder,
    bundle_with_a_link,
    bundle_whose_manifest_is_a_link,
    marked_with_a_file,
    marked_with_a_link,
    marked_by_a_link,
]


def picture(folder: Path) -> dict[str, object]:
    """All that is in a folder: contents of files, targets of links."""
    seen: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        seen[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return seen


@pytest.mark.parametrize("name", ["bundle", ".bundle.partial", ".bundle.replaced", ".bundle.lock"])
@pytest.mark.parametrize("thing", THINGS)
def test_what_is_the_users_is_found_before_the_work_and_left_alone(
    tmp_path: Path, thing: Callable[[Path], None], name: str
) -> None:
    thing(tmp_path / name)
    before = picture(tmp_path)
    with pytest.raises(ExportError, match="name another --output"):
        check_output(tmp_path / "bundle", overwrite=True)
    assert picture(tmp_path) == before
    with pytest.raises(ExportError, match="name another --output"), staged(tmp_path / "bundle", overwrite=True):
        pytest.fail("no work before the check")
    assert picture(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("thing", [*THINGS, Path.mkdir])
@pytest.mark.usefixtures("renames")
def test_what_comes_to_the_output_while_the_export_runs_stays(
    tmp_path: Path, thing: Callable[[Path], None], overwrite: bool
) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(ExportError, match=r"bundle: has come here .* the finished bundle is .*\.bundle\.partial"):
        write_bundle(output, NEW, overwrite, lambda _: thing(output))
    (tmp_path / "expected").mkdir()
    thing(tmp_path / "expected" / "bundle")
    expected = picture(tmp_path / "expected")
    shutil.rmtree(tmp_path / "expected")
    found = {name: value for name, value in picture(tmp_path).items() if not name.startswith(".bundle.partial")}
    assert found == {
        name: value.replace("expected/", "") if isinstance(value, str) else value for name, value in expected.items()
    }
    assert whole(tmp_path / ".bundle.partial") == NEW


@pytest.mark.usefixtures("renames")
def test_what_comes_into_the_old_bundle_while_the_export_runs_stays(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    write_bundle(output, OLD)
    with pytest.raises(ExportError, match="has come here"):
        write_bundle(output, NEW, during=lambda _: make(output / "notes.txt"))
    assert (output / "notes.txt").read_text() == "keep"
    (output / "notes.txt").unlink()
    assert whole(output) == OLD
    assert whole(tmp_path / ".bundle.partial") == NEW


def test_what_comes_into_the_staging_folder_is_not_in_the_bundle(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(ExportError, match=r"holds notes\.txt, which no export made"):
        write_bundle(output, NEW, during=lambda folder: make(folder / "notes.txt"))
    assert picture(tmp_path) == {".bundle.partial": None, ".bundle.partial/notes.txt": b"keep"}


def test_data_with_a_second_name_is_not_written_through(tmp_path: Path) -> None:
    marked(tmp_path / ".bundle.partial")
    os.link(tmp_path / ".bundle.partial" / "model.data", tmp_path / "theirs")
    write_bundle(tmp_path / "bundle", NEW)
    assert whole(tmp_path / "bundle") == NEW
    assert (tmp_path / "theirs").read_text() == "keep"


def test_a_damaged_bundle_is_replaced(tmp_path: Path) -> None:
    """ "Export the bundle again" is what the errors about one say."""
    output = tmp_path / "bundle"
    write_bundle(output, OLD)
    (output / "model.data").write_text("cut")
    (output / "model.onnx").unlink()
    write_bundle(output, NEW)
    assert whole(output) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_working_directory_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "bundle", OLD)
    monkeypatch.chdir(tmp_path / "bundle")
    write_bundle(Path("."), NEW)
    assert whole(tmp_path / "bundle") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_copy_of_a_bundle_elsewhere_is_nobodys_business(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", OLD)
    shutil.copytree(tmp_path / "bundle", tmp_path / "copy")
    write_bundle(tmp_path / "bundle", NEW)
    assert whole(tmp_path / "copy") == OLD


@pytest.mark.parametrize("name", ["no/where", "file/bundle", "link/bundle", "n" * 250, "a\0b", "\udcff" * 90])
def test_an_output_that_cannot_be_is_found_before_the_work(tmp_path: Path, name: str) -> None:
    make(tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "no").mkdir()
    before = picture(tmp_path)
    if name == "no/where":  # a folder that is not there yet can be made
        check_output(tmp_path / name / "bundle", overwrite=False)
    elif name == "\udcff" * 90:
        check_output(tmp_path / name, overwrite=False)  # a file system takes any bytes
    else:
        with pytest.raises(ExportError, match="cannot be written"):
            check_output(tmp_path / name, overwrite=False)
    assert picture(tmp_path) == before


@pytest.mark.usefixtures("renames")
def test_a_rename_replaces_nothing(tmp_path: Path) -> None:
    for number, thing in enumerate([*THINGS, Path.mkdir]):
        source, target = tmp_path / str(number) / "source", tmp_path / str(number) / "target"
        make(source / "file")
        thing(target)
        before = picture(tmp_path)
        with pytest.raises(FileExistsError):
            rename_new(source, target)
        assert picture(tmp_path) == before


def test_without_what_the_system_has_only_an_empty_folder_can_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look before it is too early here, as if something came in between."""
    monkeypatch.setattr(rename, "_rename", lambda *_, **__: False)
    for number, thing in enumerate(THINGS):
        source, target = tmp_path / str(number) / "source", tmp_path / str(number) / "target"
        make(source / "file")
        thing(target)
        before = picture(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "lexists", lambda _: False)
            with pytest.raises(OSError, match=r"(?i)not empty|not a directory|exists"):
                rename_new(source, target)
        assert picture(tmp_path) == before
