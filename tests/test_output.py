"""The files of --json, --junit and --markdown: what a command writes over, and what it leaves alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.errors import PhiMoEError

MARK = "### phimoe-verify"
TEXT, EARLIER = f"{MARK}: passed\n", f"{MARK}: failed, and longer than the new one\n"


@pytest.mark.parametrize("before", [None, "", EARLIER])
def test_what_may_be_written(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "report"
    if before is not None:
        path.write_text(before)
    check_file(str(path), MARK, overwrite=False)
    assert path.exists() == (before is not None)
    write_file(str(path), TEXT, MARK, overwrite=False)
    assert path.read_text() == TEXT


@pytest.mark.parametrize("theirs", [b"notes", b"\xff\x00", b" " * 300 + EARLIER.encode(), b"{}"])
def test_what_is_somebody_elses_takes_the_option(tmp_path: Path, theirs: bytes) -> None:
    path, link = tmp_path / "report", tmp_path / "link"
    path.write_bytes(theirs)
    link.symlink_to(path)
    for file in (path, link):
        for call in (lambda: check_file(str(file), MARK, False), lambda: write_file(str(file), TEXT, MARK, False)):  # noqa: B023
            with pytest.raises(PhiMoEError, match="exists and is no earlier report; name another file, or pass --over"):
                call()
    assert path.read_bytes() == theirs
    write_file(str(path), TEXT, MARK, overwrite=True)
    assert path.read_text() == TEXT


def test_what_comes_between_the_check_and_the_end_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "report"
    check_file(str(path), MARK, overwrite=False)
    path.write_text("notes")
    with pytest.raises(PhiMoEError, match="exists"):
        write_file(str(path), TEXT, MARK, overwrite=False)
    assert path.read_text() == "notes"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path, read = tmp_path / "pipe", list[str]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_file(str(path), TEXT, MARK, overwrite=False)
    reader.join()
    assert read == [TEXT]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("no/where", "cannot be written"),
        ("file/report", "cannot be written"),
        ("n" * 300, "cannot be written"),
        ("a\0b", "cannot be written"),
        (".", "is a folder"),
        ("link", "cannot be written"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("link").symlink_to("no/where")
    with pytest.raises(PhiMoEError, match=words):
        write_file(file, TEXT, MARK, overwrite=False)
    assert sorted(os.listdir()) == ["file", "link"]
