"""Mutated checkpoints against transformers 4.57; tests/test_mutants.py says how to make more of them, and one again."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.mutants import campaign

transformers = pytest.importorskip("transformers")
if not transformers.__version__.startswith("4."):
    pytest.skip("transformers 4.57 is the oracle", allow_module_level=True)

SEED = os.environ.get("PHIMOE_SEED", "0")
MUTANTS = int(os.environ.get("PHIMOE_MUTANTS", "250"))


def test_mutants() -> None:
    results = campaign.run("transformers", MUTANTS, SEED)
    found = campaign.faults(results, "transformers", SEED)
    assert not found, found
    depths = Counter(result["depth"] for result in results)
    assert depths["accepted"] + depths["run"] >= 0.2 * len(results), depths
