"""The journal of an export that was killed."""

from __future__ import annotations

from pathlib import Path

from phimoe_onnx.exporter.staging import JOURNAL, Journal


def test_a_journal_whose_last_line_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("plan\n3\n14\n1")
    journal = Journal(tmp_path, "plan")
    journal.add(7)
    journal.close()
    assert journal.done == {3, 14}
    assert (tmp_path / JOURNAL).read_text() == "plan\n3\n14\n7\n"


def test_a_journal_of_another_plan_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("plan\n3\n")
    (tmp_path / "model.data").write_bytes(b"stale")
    journal = Journal(tmp_path, "other")
    journal.close()
    assert journal.done == set()
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]
