"""How many threads a pass runs on: what is refused, which session is taken, and that no bit hangs on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phimoe_onnx import DeviceError, PhiMoE
from phimoe_onnx.runtime.ort.threads import MOST_THREADS, SMALL_PASS
from phimoe_onnx.runtime.sampling import Choice, Sampling

SMALL = Path(__file__).parent.parent / "spec" / "bundle"


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 10_000, 2**70, True, 1.0, "2", np.int64(0)])
def test_what_is_no_number_of_threads_is_refused(threads: Any) -> None:
    with pytest.raises(DeviceError, match=rf"threads is .*, expected 1 to {MOST_THREADS}, or None for the default"):
        PhiMoE.load(SMALL, threads=threads)


def test_small_passes_run_on_one_thread_and_others_on_all() -> None:
    sessions = PhiMoE.load(SMALL)._sessions
    assert sessions.weights == sum(path.stat().st_size for path in SMALL.glob("*.data"))
    most = SMALL_PASS // sessions.weights
    assert most >= 1
    assert sessions.single
    assert sessions.of(most) is sessions.single
    assert sessions.of(most + 1) is sessions.main
    assert sessions.single.get_session_options().intra_op_num_threads == 1
    assert sessions.main.get_session_options().intra_op_num_threads == 0  # ONNX Runtime's own choice


def test_threads_that_are_asked_for_are_taken_for_every_pass() -> None:
    sessions = PhiMoE.load(SMALL, threads=np.int64(2))._sessions  # type: ignore[arg-type]
    assert sessions.of(1) is sessions.main
    assert sessions.main.get_session_options().intra_op_num_threads == 2


def test_no_session_waits_long_for_its_threads() -> None:
    sessions = PhiMoE.load(SMALL)._sessions
    for session in (sessions.main, sessions.single):
        assert session
        options = session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "50"


def test_no_bit_hangs_on_the_threads() -> None:
    ids = np.random.default_rng(0).integers(3, 2000, (4, 30)).tolist()
    default, one, two = (logits_of(PhiMoE.load(SMALL, threads=threads), ids) for threads in (None, 1, 2))
    np.testing.assert_array_equal(default, one)
    np.testing.assert_array_equal(default, two)


def logits_of(model: PhiMoE, ids: list[list[int]]) -> np.ndarray:
    """What slots have after a prompt each and steps of one to four of them, some of which are small and some not."""
    found: list[np.ndarray] = []

    def look(_: Sequence[int], logits: np.ndarray) -> np.ndarray:
        found.append(logits.copy())
        return logits

    decoder = model.decoder(len(ids), 80)
    for slot, prompt in enumerate(ids):
        decoder.prefill(slot, prompt)
    for rows in (1, 2, 3, 4, 1):
        decoder.step({slot: ids[slot][rows] for slot in range(rows)})
        decoder.choose({slot: Choice(Sampling(), (), (), look) for slot in range(rows)})
    return np.array(found)
