"""The sound inputs that mutants are made of: two tiny checkpoints, an adapter, and the bundles of one of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PROMPT = [5, 60, 7, 100]
CONVERSATION = [{"role": "system", "content": "be"}, {"role": "user", "content": "a stop\n"}]
NEW_TOKENS = 6
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_local_experts": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {},
    "alpha_pattern": {"o_proj": 1},
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["q_proj", "o_proj", "w1"],
    "lora_dropout": 0.0,
}


def write_inputs(folder: Path) -> None:
    """Writes plain/, named/ (shards, longrope, files of templates, older special tokens) and adapter/."""
    import torch
    from safetensors.torch import save_file

    from tests.checkpoints import longrope, write_checkpoint
    from tests.toy_bundle import TEMPLATE, make_tokenizer

    tokenizer = make_tokenizer()
    size = tokenizer.get_vocab_size()
    end, user = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|user|>")
    common = SHAPE | {"vocab_size": size, "eos_token_id": end}
    plain = write_checkpoint(folder / "plain", **common)
    named = write_checkpoint(folder / "named", shards=2, **common, rope_scaling=longrope(16), sliding_window=9)
    texts = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    declared = {
        str(id): FLAGS | {"content": token, "rstrip": id >= size - 4}
        for token in ("<unk>", "<s>", "<|end|>", "<|user|>")
        if (id := tokenizer.token_to_id(token)) is not None
    }
    config = {**texts, "add_bos_token": False, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    _write(plain / "tokenizer_config.json", config | {"added_tokens_decoder": declared, "chat_template": TEMPLATE})
    _write(named / "tokenizer_config.json", {"clean_up_tokenization_spaces": True, "eos_token": "<|end|>"})
    _write(named / "special_tokens_map.json", texts | {"additional_special_tokens": ["<|user|>", "<|end|>"]})
    (named / "chat_template.jinja").write_text(TEMPLATE)
    (named / "additional_chat_templates").mkdir()
    (named / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | tojson }}" + TEMPLATE)
    for checkpoint in (plain, named):
        (checkpoint / "tokenizer.json").write_text(tokenizer.to_str())
        _write(checkpoint / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [end, user]})
    (folder / "adapter").mkdir()
    _write(folder / "adapter" / "adapter_config.json", ADAPTER)
    torch.manual_seed(1)
    layer = "base_model.model.model.layers.0."
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.o_proj": (32, 32), "block_sparse_moe.experts.1.w1": (32, 32)}
    factors = {}
    for module, (rows, columns) in shapes.items():
        factors[f"{layer}{module}.lora_A.weight"] = torch.randn(2, columns)
        factors[f"{layer}{module}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")


def bundles(folder: Path) -> Path:
    """The folder of the bundles generate/ and embed/, made in `folder` unless MUTANTS_BUNDLES names one made before."""
    made = Path(os.environ.get("MUTANTS_BUNDLES", folder / "bundles"))
    if not made.exists():
        write_bundles(made)
    return made


def write_bundles(folder: Path) -> None:
    """Writes the bundles of plain/: generate/ and embed/."""
    from phimoe_onnx.exporter import pipeline  # imports torch, which runs no mutant of a bundle

    write_inputs(folder)
    pipeline.export(folder / "plain", folder / "generate", quantize="int4", operators="stock")
    pipeline.export(folder / "plain", folder / "embed", task="feature-extraction")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
