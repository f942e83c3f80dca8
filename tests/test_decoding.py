"""The manifest's decoding section: what a generation loop in any language needs of the checkpoint's own files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from phimoe_onnx.bundle import CacheShape, Decoding
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ConfigError
from phimoe_onnx.exporter.manifest.decoding import read_decoding
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import target_named
from tests.checkpoints import MODEL

CONFIG = read_config(MODEL)
CHAT = {"<|endoftext|>": 2043, "<|assistant|>": 2044, "<|system|>": 2045, "<|end|>": 2046, "<|user|>": 2047}


def decoding(folder: Path, target: str = "cpu") -> Decoding:
    return read_decoding(CONFIG, folder, recipe_for(CONFIG, target_named(target)))


def test_the_small_model() -> None:
    assert decoding(MODEL, "cpu") == Decoding(
        vocab_size=2048,
        context=1024,
        rope_boundary=256,
        prefill_chunk=512,
        eos_token_ids=(2046, 2043),
        hidden_tokens={"<unk>": 0, "<s>": 1, "</s>": 2, **CHAT},
        cache=CacheShape(num_hidden_layers=4, num_key_value_heads=2, head_dim=32, dtype="float32", shared=True),
    )
    assert not decoding(MODEL, "portable").cache.shared


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"eos_token_id": 7}, (7,)), ({"eos_token_id": [8, 7]}, (8, 7)), ({}, (2043,)), (None, (2043,))],
)
def test_the_end_tokens_fall_back_on_config_json(
    tmp_path: Path, given: dict[str, object] | None, expected: tuple[int, ...]
) -> None:
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    if given is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert decoding(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("eos", ["</s>", [7, 1.5], [-1], True])
def test_bad_end_tokens_are_named(tmp_path: Path, eos: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(
        ConfigError, match=f"generation_config.json: eos_token_id is {re.escape(repr(eos))}, expected a token id"
    ):
        decoding(tmp_path)
