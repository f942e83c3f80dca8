"""Merged adapters against peft's merge_and_unload, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phimoe_onnx.checkpoint.adapter import read_adapter
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import read_config
from tests.checkpoints import TASKS, write_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["w1", "w2", "w3"]
CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": EXPERTS, "r": 3, "lora_alpha": 7},
    "everything": {"target_modules": "all-linear"},
    "router and head": {"target_modules": ["gate", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "patterns": {
        "target_modules": [*ATTENTION, *EXPERTS],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 5, r"experts\.[01]\.w1": 3},
        "alpha_pattern": {"w2": 40, "self_attn.v_proj": 1},
    },
    "saved": {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "input_layernorm"]},
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [1], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_pefts(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, num_local_experts=4)
    check(checkpoint, tmp_path, transformers.PhimoeForCausalLM, dtype, **CASES[case])


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_other_tasks(tmp_path: Path, task: str) -> None:
    model = {"text-classification": "PhimoeForSequenceClassification", "feature-extraction": "PhimoeModel"}[task]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", num_local_experts=4, pad_token_id=0, **TASKS[task])
    saved = {"modules_to_save": ["score"]} if task == "text-classification" else {}
    options = {"target_modules": [*ATTENTION, *EXPERTS], **saved}
    check(checkpoint, tmp_path, getattr(transformers, model), torch.float32, task, **options)


def check(
    checkpoint: Path, folder: Path, model: Any, dtype: torch.dtype, task: str = "text-generation", **options: Any
) -> None:
    """Trains nothing, but gives every number of an adapter a value, saves it, and merges it in both ways."""
    torch.manual_seed(0)
    trained = peft.get_peft_model(model.from_pretrained(checkpoint, dtype=dtype), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    trained.save_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(model.from_pretrained(checkpoint, dtype=dtype), folder / "adapter")
    loaded.merge_and_unload().save_pretrained(folder / "merged")
    config = read_config(checkpoint)
    expected = parameters(config, read_headers(folder / "merged"), task)
    before = parameters(config, read_headers(checkpoint), task)
    merged = parameters(config, read_headers(checkpoint), task, read_adapter(folder / "adapter"))
    changed = 0
    for name, rows in merged.items():
        for part, theirs, base in zip(rows, expected[name], before[name], strict=True):
            assert part.read().dtype == theirs.read().dtype == dtype
            assert torch.equal(part.read(), theirs.read()), name
            changed += not torch.equal(part.read(), base.read())
    assert changed
