"""What the manifest tells a generation loop: gathered here once, so that no language reads the checkpoint's files for
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phimoe_onnx.bundle import SAMPLING, CacheDtype, CacheShape, Decoding
from phimoe_onnx.config import PhiMoEConfig, read_token_ids
from phimoe_onnx.exporter.recipe import Recipe
from phimoe_onnx.exporter.tokenizer import all_hidden_tokens
from phimoe_onnx.files import read_json
from phimoe_onnx.text.special_tokens import read_tokenizer_config


def read_decoding(config: PhiMoEConfig, folder: Path, recipe: Recipe) -> Decoding:
    """The manifest's section for a checkpoint in `folder`.

    Raises:
        ConfigError: generation_config.json or tokenizer.json is damaged.
    """
    rope = config.longrope
    dtypes: dict[str, CacheDtype] = {"none": recipe.dtype, "fp16": "float16", "int8": "int8", "int4": "uint8"}
    cache = CacheShape(
        num_hidden_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim // 2 if recipe.kv_cache == "int4" else config.head_dim,
        dtype=dtypes[recipe.kv_cache],
        shared=recipe.target.shared_cache,
    )
    return Decoding(
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        rope_boundary=rope.original_max_position_embeddings if rope else None,
        prefill_chunk=recipe.target.prefill_chunk,
        eos_token_ids=eos_token_ids(config, read_generation(folder)),
        hidden_tokens=all_hidden_tokens(folder),
        cache=cache,
        sampling_graph=SAMPLING if recipe.draws_on_device else None,
        clean_up_tokenization_spaces=bool(read_tokenizer_config(folder).get("clean_up_tokenization_spaces")),
    )


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, or nothing where there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def eos_token_ids(config: PhiMoEConfig, generation: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens: generation_config.json's, for it has those that end an answer in a chat; else config.json's."""
    return (
        read_token_ids(generation, "eos_token_id", config.vocab_size, "generation_config.json") or config.eos_token_id
    )
