"""The order of the steps, their ties and edges, and the random numbers that spec/sampling.md promises."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.sampling import Sampling, draw, most_likely, penalize, sample, uniform


def logits_of(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def test_uniform_is_splitmix64() -> None:
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [uniform(1234567, step) for step in range(5)] == [(z >> 11) / 2**53 for z in expected]
    assert uniform(1234567 + 2**64, 0) == uniform(1234567, 0)
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    assert sample(np.array([1, 5, 5, 0], np.float32), Sampling(), step=0) == 1


def test_penalty_divides_positive_and_multiplies_other_logits() -> None:
    logits = np.array([2, -2, 4, 0], np.float32)
    assert penalize(logits, {0, 1, 3}, 2.0).tolist() == [1, -4, 4, 0]
    assert logits.tolist() == [2, -2, 4, 0]
    assert sample(np.array([3, 2.5], np.float32), Sampling(repetition_penalty=1.5), 0, seen={0}) == 1


@given(
    st.lists(st.sampled_from([-math.inf, -2.5, -1.0, -0.0, 0.0, 1e-30, 3.0, 7.25]), min_size=1, max_size=40),
    st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_most_likely_is_a_stable_sort(values: list[float], count: int) -> None:
    expected = sorted(range(len(values)), key=lambda id: -values[id])[:count]
    assert most_likely(np.array(values, np.float32), count).tolist() == expected


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.71}, {0, 1, 3}),
        ({"top_p": 0.001}, {1}),
        ({"min_p": 0.5}, {0, 1, 3}),
        ({"min_p": 0.6}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 2, "top_p": 0.5}, {1}),  # top-p counts what top-k left: 0.4 of 0.7 is more than a half
        ({"temperature": 0.25, "min_p": 0.3}, {1, 3}),  # min-p comes after temperature: (0.3 / 0.4) ** 4 = 0.32
    ],
)
def test_truncation(options: dict, kept: set[int]) -> None:
    logits = logits_of(0.2 + 1e-6, 0.4 + 1e-6, 0.1 - 1e-6, 0.3 - 1e-6)
    sampling = Sampling(**{"temperature": 1.0, **options})
    assert {draw(logits, sampling, u) for u in np.arange(1000) / 1000} == kept


def test_the_draw_walks_down_from_the_most_likely_token() -> None:
    logits = logits_of(0.25, 0.5, 0.25)
    order = [draw(logits, Sampling(temperature=1.0), u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53)]
    assert order == [1, 1, 0, 0, 2, 2]


def test_frequencies_are_the_probabilities() -> None:
    logits = logits_of(0.1, 0.6, 0.3)
    drawn = [sample(logits, Sampling(temperature=1.0, seed=7), step) for step in range(20000)]
    assert np.bincount(drawn, minlength=3) / 20000 == pytest.approx([0.1, 0.6, 0.3], abs=0.015)


def plain(logits: list[float], sampling: Sampling, step: int) -> int:
    """spec/sampling.md step by step, without numpy."""
    order = sorted(range(len(logits)), key=lambda id: -logits[id])[: sampling.top_k or None]
    weights = [math.exp(logits[id] / sampling.temperature - logits[order[0]] / sampling.temperature) for id in order]
    sums = list(itertools.accumulate(weights))
    n = len(order)
    if sampling.top_p < 1:
        n = next(n for n in range(1, n + 1) if sums[n - 1] >= sampling.top_p * sums[-1])
    if sampling.min_p > 0:
        n = min(n, sum(weight >= sampling.min_p for weight in weights))
    u = uniform(sampling.seed, step)
    return next((id for id, c in zip(order[:n], sums, strict=False) if c > u * sums[n - 1]), order[n - 1])


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.9, "min_p": 0.05}]
)
def test_the_specification_in_plain_python_agrees(options: dict) -> None:
    random = np.random.default_rng(3)
    for step in range(200):
        logits = random.normal(size=100).round(1).astype(np.float32)  # rounded, so that there are ties
        sampling = Sampling(temperature=0.7, seed=11, **options)
        assert sample(logits, sampling, step) == plain(logits.tolist(), sampling, step)


def test_fixed_tokens_for_a_fixed_seed() -> None:
    """Other languages hold themselves against this line."""
    logits = (np.arange(64) % 7).astype(np.float32)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, seed=42)
    assert [sample(logits, sampling, step) for step in range(8)] == [55, 13, 20, 27, 6, 12, 20, 62]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
)
def test_options_out_of_range_are_named(options: dict) -> None:
    with pytest.raises(GenerationError, match=next(iter(options))):
        Sampling(**options)


def test_nonsense_from_the_graph_is_an_error() -> None:
    with pytest.raises(GenerationError, match="not finite"):
        sample(np.array([1, math.nan], np.float32), Sampling(), 0)
