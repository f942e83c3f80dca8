"""An export that is interrupted: nothing under the final name, resumed by the next run, byte-identical in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter import write
from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.exporter.staging import JOURNAL, Journal, staged


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def interrupted(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint and the output of its export, which was interrupted after ten jobs."""
    source, output = checkpoint("plain"), tmp_path / "bundle"
    written = []

    def run(*arguments: object) -> None:
        written.append(arguments)
        if len(written) > 10:
            raise KeyboardInterrupt
        original(*arguments)  # type: ignore[arg-type]

    original = write._write
    with monkeypatch.context() as patch:
        patch.setattr(write, "_write", run)
        with pytest.raises(KeyboardInterrupt):
            export(source, output, quantize="int4")
    return source, output


def test_an_interrupt_leaves_no_bundle_and_the_next_run_goes_on(
    interrupted: tuple[Path, Path], bundle: Callable[[str, str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = interrupted
    staging = output.parent / ".bundle.partial"
    assert not output.exists()
    done = len((staging / JOURNAL).read_text().splitlines()) - 1
    assert done >= 1
    ran = []
    original = write._write
    monkeypatch.setattr(write, "_write", lambda *arguments: (ran.append(arguments), original(*arguments)))
    export(source, output, quantize="int4")
    undisturbed = bundle("plain", "cpu", "int4")
    total = len(ran) + done
    assert len({id(arguments[0]) for arguments in ran}) == len(ran) < total
    assert contents(output) == contents(undisturbed)
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_what_other_options_left_is_not_gone_on_with(interrupted: tuple[Path, Path], bundle: Callable[[str, str, str], Path]) -> None:
    source, output = interrupted
    export(source, output, quantize="int8")
    assert contents(output) == contents(bundle("plain", "cpu", "int8"))


def test_a_journal_whose_last_line_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("plan\n3\n14\n1")
    journal = Journal(tmp_path, "plan")
    journal.add(7)
    journal.close()
    assert journal.done == {3, 14}
    assert (tmp_path / JOURNAL).read_text() == "plan\n3\n14\n7\n"


def test_two_exports_of_one_output_at_once(tmp_path: Path) -> None:
    with staged(tmp_path / "bundle") as first:
        (first / "file").write_text("whole")
        with pytest.raises(ExportError, match="another export is writing"), staged(tmp_path / "bundle"):
            pass
        assert (first / "file").read_text() == "whole"
    assert contents(tmp_path / "bundle") == {"file": b"whole"}
