"""Which width each group of matrices gets, where a number of bytes is all that they may take together.

That is a multiple-choice knapsack: of each item one choice, at the least cost in all, within a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

UNITS = 1 << 20  # the most pieces that a budget is counted in


class Choice(NamedTuple):
    """One way to store an item: its bytes, and what it costs, in nats."""

    nbytes: int
    cost: float


def allocate(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The number of the choice that each item gets: the least cost in all, at no more than `budget` bytes in all.

    1. Of each item those choices are left that no other beats in both bytes and cost (the Pareto set).
    2. Dynamic programming over what is left of the budget, when every item has its smallest choice. It counts in the
       greatest common divisor of all sizes, and is exact. Where that would be more than `UNITS` pieces it counts in
       coarser ones, and sizes are rounded up.
    3. What the rounding left is spent step by step, each time on what saves most for its bytes.

    Of two ways of one cost the one with fewer bytes is taken, and of two such items' the first.

    Raises:
        ValueError: even the smallest choices need more than `budget`.
    """
    fronts = [pareto(choices) for choices in items]
    smallest = [front[0] for front in fronts]
    spare = budget - sum(item[index].nbytes for item, index in zip(items, smallest, strict=True))
    if spare < 0:
        raise ValueError(f"the smallest choices need {budget - spare} bytes, and {budget} are there")
    extra = [
        [item[index].nbytes - item[first].nbytes for index in front]
        for item, front, first in zip(items, fronts, smallest, strict=True)
    ]
    unit = math.gcd(*(size for sizes in extra for size in sizes)) or 1
    spare = min(spare, sum(max(sizes) for sizes in extra))
    unit = max(unit, -(-spare // UNITS))
    chosen = _dynamic(items, fronts, [[-(-size // unit) for size in sizes] for sizes in extra], spare // unit)
    return _fill(items, fronts, chosen, budget)


def pareto(choices: Sequence[Choice]) -> list[int]:
    """The numbers of the choices that no other beats, from the fewest bytes to the most; of equal ones the first."""
    front: list[int] = []
    for index in sorted(range(len(choices)), key=lambda index: (*choices[index], index)):
        if not front or choices[index].cost < choices[front[-1]].cost:
            front.append(index)
    return front


def _dynamic(
    items: Sequence[Sequence[Choice]], fronts: list[list[int]], extra: list[list[int]], spare: int
) -> list[int]:
    """The best choices whose `extra` sizes, in units, are at most `spare` together."""
    least = np.zeros(spare + 1)  # the cost of the items so far, by the units that they may take
    taken = []
    for item, front, sizes in zip(items, fronts, extra, strict=True):
        best = np.full(spare + 1, np.inf)
        which = np.zeros(spare + 1, np.uint8)
        for place, (index, size) in enumerate(zip(front, sizes, strict=True)):
            if size <= spare:
                cost = least[: spare + 1 - size] + item[index].cost
                better = cost < best[size:]
                best[size:][better] = cost[better]
                which[size:][better] = place
        least = best
        taken.append(which)
    left = int(np.argmin(least))  # the fewest units of the least cost
    chosen = []
    for front, sizes, which in zip(reversed(fronts), reversed(extra), reversed(taken), strict=True):
        place = int(which[left])
        left -= sizes[place]
        chosen.append(front[place])
    return chosen[::-1]


def _fill(items: Sequence[Sequence[Choice]], fronts: list[list[int]], chosen: list[int], budget: int) -> list[int]:
    """The choices, with steps to larger and better ones as long as one fits."""
    while True:
        left = budget - sum(item[index].nbytes for item, index in zip(items, chosen, strict=True))
        steps = [
            ((item[now].cost - item[index].cost) / (item[index].nbytes - item[now].nbytes), -number, index)
            for number, (item, front, now) in enumerate(zip(items, fronts, chosen, strict=True))
            for index in front
            if 0 < item[index].nbytes - item[now].nbytes <= left
        ]
        if not steps:
            return chosen
        _, number, index = max(steps)
        chosen[-number] = index
