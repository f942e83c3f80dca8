"""benchmarks/widen.py: the widened model is the small one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phimoe_onnx.reference import load_reference, logits
from tests.checkpoints import MODEL, assert_close, random_ids


@pytest.fixture(scope="module")
def it() -> Any:
    """The script as a module."""
    file = Path(__file__).parents[1] / "benchmarks" / "widen.py"
    spec = importlib.util.spec_from_file_location("widen", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["widen"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def test_the_widened_model_gives_the_small_ones_logits(it: Any, tmp_path: Path) -> None:
    """On both sides of the rope boundary of 256, by odd and even factors, with layers and tokens that add nothing."""
    factors = it.Factors(hidden=3, heads=1, head_dim=4, experts=2, layers=5, vocab=2100)
    it.widen(MODEL, tmp_path / "wide", factors, report=lambda line: None)
    wide, small = load_reference(tmp_path / "wide"), load_reference(MODEL)
    config = json.loads((tmp_path / "wide" / "config.json").read_text(encoding="utf-8"))
    assert [config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")] == [
        576, 6, 2, 128,
    ]  # fmt: skip
    for length in (30, 260):
        found, expected = (logits(model, random_ids(length)) for model in (wide, small))
        assert_close(found[..., :2048], expected)
        assert (found[..., 2048:] == it.NEVER).all()


def test_noise_moves_weights_by_a_part_of_themselves(it: Any, tmp_path: Path) -> None:
    factors = it.Factors(hidden=1, heads=1, head_dim=1, experts=1, layers=4, vocab=2048)
    for noise in (0.0, 0.01):
        it.widen(MODEL, tmp_path / str(noise), factors, noise, report=lambda line: None)
    name = "model.layers.2.self_attn.v_proj.weight"
    small = {k: v for file in MODEL.glob("*.safetensors") for k, v in load_file(file).items()}[name].float()
    same, moved = (load_file(tmp_path / noise / "model-00003-of-00005.safetensors")[name] for noise in ("0.0", "0.01"))
    assert torch.equal(same.float(), small)
    assert 0.005 < ((moved.float() - small).norm() / small.norm()).item() < 0.02


def test_shares_sum_to_one_and_are_powers_of_two(it: Any) -> None:
    for count in range(1, 40):
        shares = it.shares(count)
        assert (len(shares), sum(shares)) == (count, 1.0)
        assert max(shares) <= 2 * min(shares)
        assert all(torch.tensor(3.0 * share, dtype=torch.bfloat16).item() == 3.0 * share for share in shares)


@pytest.mark.parametrize("factors", [{"head_dim": 2}, {"layers": 3}, {"vocab": 100}, {"hidden": 0}])
def test_what_has_no_widened_form_is_refused(it: Any, tmp_path: Path, factors: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"head-dim|num_hidden_layers|vocab_size|1 or more"):
        it.widen(MODEL, tmp_path / "wide", it.Factors(**factors))
    assert not (tmp_path / "wide").exists()
