"""What users hand in, mutated: every run is right, or refused with an error of ours that names what is wrong.

PHIMOE_MUTANTS is how many mutants of each campaign are made, PHIMOE_SEED makes others. A fault's message ends with the
command that makes its mutant again.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import campaign
from tests.mutants.inputs import bundles

SEED = os.environ.get("PHIMOE_SEED", "0")
MUTANTS = os.environ.get("PHIMOE_MUTANTS")
COUNTS = {"export": 500, "load": 600, "options": 1500}
# the least share of the mutants that must get so deep: a mutator that only breaks JSON tests nothing
DEPTHS = {
    "export": {"read": 0.02, "config": 0.05, "tokenizer": 0.05, "weights": 0.05, "accepted": 0.2, "run": 0.01},
    "load": {"manifest": 0.05, "files": 0.05, "tokenizer": 0.03, "graph": 0.03, "accepted": 0.3},
    "options": {"refused": 0.2, "run": 0.3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles that mutants are made of, for all processes."""
    return bundles(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("name", COUNTS)
def test_mutants(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUTANTS_BUNDLES", str(made))
    results = campaign.run(name, int(MUTANTS or COUNTS[name]), SEED)
    found = campaign.faults(results, name, SEED)
    assert not found, found
    depths = Counter(result["depth"] for result in results)
    shares = {depth: depths[depth] / len(results) for depth in DEPTHS[name]}
    assert all(shares[depth] >= least for depth, least in DEPTHS[name].items()), depths
