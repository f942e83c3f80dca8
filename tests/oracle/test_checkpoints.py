"""Which of a checkpoint's files transformers reads, and which of its configurations it refuses: we do the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phimoe_onnx.checkpoint.tensors import INDEX
from phimoe_onnx.config import for_transformers, read_config
from phimoe_onnx.errors import ConfigError
from phimoe_onnx.reference import load_reference
from tests.checkpoints import BASE, longrope, write_checkpoint

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LONGROPE = longrope(16)


def test_the_only_file_goes_before_an_index(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3, seed=1)
    write_checkpoint(folder, seed=2)
    assert (folder / INDEX).exists()
    theirs = transformers.PhimoeForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert torch.equal(load_reference(folder).state_dict()["lm_head.weight"], theirs["lm_head.weight"])


@pytest.mark.skipif(transformers.__version__.startswith("5."), reason="transformers 5 takes some of them")
@pytest.mark.parametrize(
    "scaling",
    [0, False, {}, {"type": "default"}, {key: value for key, value in LONGROPE.items() if key != "type"}],
    ids=str,
)
def test_what_is_refused(tmp_path: Path, scaling: Any) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, num_local_experts=2)
    (folder / "config.json").write_text(
        json.dumps(BASE | {"num_hidden_layers": 1, "num_local_experts": 2, "rope_scaling": scaling})
    )
    with pytest.raises(ConfigError, match="rope_scaling"):
        read_config(folder)
    with pytest.raises((TypeError, KeyError, AttributeError)):
        transformers.PhimoeForCausalLM.from_pretrained(folder)


def test_grin_moe_opens_in_transformers_as_a_bundles_config_says(tmp_path: Path) -> None:
    raw = BASE | {"model_type": "grinmoe", "architectures": ["GRIN-MoE"], "auto_map": {"AutoConfig": "x.GRINMoEConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(for_transformers(raw)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is transformers.PhimoeConfig
    assert config.architectures == [transformers.PhimoeForCausalLM.__name__]
