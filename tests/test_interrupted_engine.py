"""Ctrl-C in the thread that drives the engine, at any line: what others have asked for goes on, token for token."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phimoe_onnx import PhiMoE
from phimoe_onnx.runtime import Piece
from phimoe_onnx.runtime.speculation import Account
from tests.toy_bundle import BOUNDARY, write_bundle

FUNCTIONS = {"_admit", "_begin", "_release_nobodys", "_advance", "_prefill"}
FUNCTIONS |= {"begin", "renew", "run_chunk", "_run_chunk", "next_chunk", "crosses"}  # of the decoder
AHEAD = {"_drafts", "_run_ahead", "_take_ahead", "run_ahead", "take_ahead", "drop_ahead", "room_ahead"}
NEW_TOKENS = 8


class Interrupt:
    """Raises KeyboardInterrupt before one line of these functions, counted from 0 over all of them.

    Attributes:
        lines: those that were come to, by function and number.

    """

    def __init__(self, at: int | None, functions: Collection[str] = frozenset(FUNCTIONS)) -> None:
        self.at = at
        self.functions = functions
        self.lines: list[tuple[str, int]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Interrupt | None:
        """See sys.settrace."""
        name = frame.f_code.co_name
        if name not in self.functions or not frame.f_code.co_filename.endswith(("engine.py", "decoder.py")):
            return None
        if event == "line":
            self.lines.append((name, frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                raise KeyboardInterrupt
        return self


def write(model: PhiMoE, prompts: list[list[int]], interrupt: Interrupt, **options: Any) -> list[list[int]]:
    """The new tokens of each prompt."""
    found: list[list[int]] = [[] for _ in prompts]
    ended = 0

    def deliver(piece: Piece | Exception) -> None:
        nonlocal ended
        assert isinstance(piece, Piece), piece
        found[piece.row].append(piece.token_id)
        ended += piece.result is not None

    requests = [
        model.request(prompt, max_new_tokens=NEW_TOKENS + 3 * row, **options) for row, prompt in enumerate(prompts)
    ]
    model.engine.submit(requests, deliver, session="someone")
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        for _ in range(200):
            if ended == len(prompts):
                break
            with suppress(KeyboardInterrupt):
                model.engine.step()
    finally:
        sys.settrace(before)
    return found


def test_ctrl_c_at_any_line_loses_no_row_and_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "bundle")
    model = PhiMoE.load(tmp_path / "bundle", threads=1, slots=2)
    monkeypatch.setattr(model, "eos", frozenset())
    monkeypatch.setattr(model._decoders, "decoding", replace(model.decoding, prefill_chunk=9))
    prompts = [[5, 6, 7] * 5, [9] * (BOUNDARY - 2), [8, 4]]  # in chunks; over the boundary; waiting for a slot
    whole = Interrupt(None)
    right = write(model, prompts, whole)
    assert [len(row) for row in right] == [NEW_TOKENS, NEW_TOKENS + 3, NEW_TOKENS + 6]
    seen: Counter[tuple[str, int]] = Counter()
    for at, line in enumerate(whole.lines):
        seen[line] += 1
        if seen[line] <= 2:  # the first and the second time that the line is come to
            assert write(model, prompts, Interrupt(at)) == right, f"interrupted at {line}, time {seen[line]}"
            assert [*model.engine._running, *model.engine._prefilling, *model.engine._arrived] == []
    assert {name for name, _ in seen} == FUNCTIONS


def test_ctrl_c_at_any_line_of_a_draft_loses_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "bundle")
    model = PhiMoE.load(tmp_path / "bundle", threads=1, slots=3)
    monkeypatch.setattr(model, "eos", frozenset())
    monkeypatch.setattr(Account, "stepped", lambda *_: None)  # beside what a plain step takes no draft costs anything
    model.engine.account.token = math.inf

    def repeat(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(token_ids) != 11:  # which breaks a draft
            logits[[5, 6, 7][len(token_ids) % 3]] += 10000
        return logits

    prompts = [[8], [8, 4], [5, 6, 7] * 9]  # of which the last has drafts
    options = {"logits_processor": repeat, "speculate": True}
    whole = Interrupt(None, AHEAD)
    right = write(model, prompts, whole, **options)
    assert right == write(model, prompts, Interrupt(None), logits_processor=repeat)
    seen: Counter[tuple[str, int]] = Counter()
    for at, line in enumerate(whole.lines):
        seen[line] += 1
        if seen[line] <= 2:
            assert write(model, prompts, Interrupt(at, AHEAD), **options) == right, f"interrupted at {line}"
            assert [*model.engine._running, *model.engine._prefilling, *model.engine._arrived] == []
    assert {name for name, _ in seen} == AHEAD
