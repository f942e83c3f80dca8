"""The knapsack of widths, against all ways there are."""

from __future__ import annotations

import itertools
import random

import pytest

from phimoe_onnx.exporter.quantize import allocate as module
from phimoe_onnx.exporter.quantize.allocate import Choice, allocate, pareto

Items = list[list[Choice]]


def random_items(rng: random.Random, count: int, unit: int) -> Items:
    return [
        [Choice(unit * rng.randint(1, 30), rng.choice([0.0, round(rng.random(), 2)])) for _ in range(rng.randint(1, 4))]
        for _ in range(count)
    ]


def totals(items: Items, chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [item[index] for item, index in zip(items, chosen, strict=True)]
    return sum(choice.nbytes for choice in taken), sum(choice.cost for choice in taken)


def brute_force(items: Items, budget: int) -> float:
    """The least cost of all ways that fit."""
    ways = (totals(items, way) for way in itertools.product(*(range(len(item)) for item in items)))
    return min(cost for nbytes, cost in ways if nbytes <= budget)


def steps_that_fit(items: Items, chosen: list[int], budget: int) -> list[tuple[int, Choice]]:
    left = budget - totals(items, chosen)[0]
    return [
        (number, choice)
        for number, (item, index) in enumerate(zip(items, chosen, strict=True))
        for choice in item
        if choice.cost < item[index].cost and choice.nbytes - item[index].nbytes <= left
    ]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_ways(seed: int) -> None:
    rng = random.Random(seed)
    items = random_items(rng, 5, rng.choice([1, 7, 4096]))
    least = sum(min(choice.nbytes for choice in item) for item in items)
    budget = least + rng.randint(0, 80) * rng.choice([1, 1000])
    chosen = allocate(items, budget)
    nbytes, cost = totals(items, chosen)
    assert nbytes <= budget
    assert cost == pytest.approx(brute_force(items, budget), abs=1e-12)
    assert allocate(items, budget) == chosen


@pytest.mark.parametrize("seed", range(10))
def test_in_coarse_units_it_still_fits_and_leaves_nothing_that_would(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNITS", 40)
    rng = random.Random(seed)
    items = random_items(rng, 6, 1)
    budget = sum(min(choice.nbytes for choice in item) for item in items) + rng.randint(0, 120)
    chosen = allocate(items, budget)
    nbytes, cost = totals(items, chosen)
    assert nbytes <= budget
    assert not steps_that_fit(items, chosen, budget)
    assert brute_force(items, budget) <= cost <= sum(max(choice.cost for choice in item) for item in items)


def test_what_another_beats_is_never_taken() -> None:
    choices = [Choice(4, 0.5), Choice(3, 0.5), Choice(2, 0.9), Choice(3, 0.5), Choice(9, 0.6), Choice(9, 0.1)]
    assert pareto(choices) == [2, 1, 5]
    assert allocate([choices], 100) == [5]
    assert allocate([choices], 8) == [1]


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="need 7 bytes, and 6 are there"):
        allocate([[Choice(3, 1.0)], [Choice(4, 1.0), Choice(8, 0.0)]], 6)


def test_as_many_items_as_a_large_model_has() -> None:
    """Sizes of Phi-3.5-MoE's matrices; the best by a Lagrange multiplier is a bound from below."""
    rng = random.Random(0)
    items: Items = []
    for _ in range(32):
        for weights in (6144 * 4096, 4096 * 4096, 16 * 12800 * 4096, 16 * 4096 * 6400):
            scale = weights * rng.uniform(0.5, 2)
            items.append([Choice(weights * bits // 8 + weights // 64, scale * 4.0**-bits) for bits in (2, 3, 4, 8)])
    budget = sum(item[0].nbytes for item in items) * 5 // 4
    chosen = allocate(items, budget)
    nbytes, cost = totals(items, chosen)
    assert nbytes <= budget
    assert not steps_that_fit(items, chosen, budget)
    bounds = [
        sum(min(choice.cost + price * choice.nbytes for choice in item) for item in items) - price * budget
        for price in (2.0 ** (-eighths / 8) for eighths in range(480))
    ]
    assert max(bounds) <= cost <= 1.01 * max(bounds)
