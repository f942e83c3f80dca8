"""The sampling graph draws what runtime/sampling.py draws, and moves mask and seen tokens on by what it drew."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from phimoe_onnx.exporter.sampling import sampling_graph
from phimoe_onnx.runtime.sampling import Sampling, sample, uniform

ROWS, VOCAB_SIZE = 3, 200


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(sampling_graph()).SerializeToString())


def run(
    session: ort.InferenceSession, logits: np.ndarray, seen: np.ndarray, sampling: Sampling, steps: list[int]
) -> list[np.ndarray]:
    def column(value: float, dtype: type) -> np.ndarray:
        return np.full((len(logits), 1), value, dtype)

    inputs = {
        "logits": logits[:, None],
        "attention_mask": (np.arange(16) < np.array([[3], [5], [15]])[: len(logits)]).astype(np.int64),
        "seen": seen,
        "greedy": np.array([sampling.temperature == 0]),
        "repetition_penalty": column(sampling.repetition_penalty, np.float32),
        "temperature": column(sampling.temperature or 1, np.float64),
        "top_k": column(sampling.top_k or logits.shape[1], np.int64),
        "top_p": column(sampling.top_p, np.float64),
        "min_p": column(sampling.min_p, np.float64),
        "u": np.array([[uniform(sampling.seed, step)] for step in steps]),
    }
    return session.run(None, inputs)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.3])
@pytest.mark.parametrize("top_k", [0, 1, 40])
def test_the_graph_draws_as_numpy_does(session: ort.InferenceSession, temperature: float, top_k: int) -> None:
    random = np.random.default_rng(top_k)
    for top_p, min_p, penalty in itertools.product((1, 0.9, 0.3), (0, 0.1, 1), (1, 1.3)):
        # rounded, so that there are ties
        logits = random.normal(size=(ROWS, VOCAB_SIZE), scale=3).round(1).astype(np.float32)
        seen = random.random((ROWS, VOCAB_SIZE)) < 0.1
        sampling = Sampling(temperature, top_k, top_p, min_p, penalty, seed=top_k)
        steps = random.integers(100, size=ROWS).tolist()
        ids, mask, now_seen = run(session, logits, seen, sampling, steps)
        rows = zip(logits, steps, seen, strict=True)
        assert ids[:, 0].tolist() == [
            sample(row, sampling, step, set(np.flatnonzero(before).tolist())) for row, step, before in rows
        ]
        assert mask.tolist() == (np.arange(16) < np.array([[4], [6], [16]])).astype(int).tolist()
        seen[np.arange(ROWS), ids[:, 0]] = True
        assert (now_seen == seen).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_nonsense_gives_no_token(session: ort.InferenceSession, value: float, temperature: float) -> None:
    logits = np.zeros((2, VOCAB_SIZE), np.float32)
    logits[1, 7] = value
    ids, *_ = run(session, logits, np.zeros(logits.shape, bool), Sampling(temperature), [0, 0])
    assert ids[:, 0].tolist()[1] == -1
    assert ids[0, 0] >= 0
