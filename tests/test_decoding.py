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
from phimoe_onnx.exporter.manifest.decoding import hidden_tokens, read_decoding
from tests.checkpoints import MODEL
from tests.toy_bundle import SPECIAL, make_tokenizer

CONFIG = read_config(MODEL)
CHAT = {"<|endoftext|>": 2043, "<|assistant|>": 2044, "<|system|>": 2045, "<|end|>": 2046, "<|user|>": 2047}


def test_the_small_model() -> None:
    assert read_decoding(CONFIG, MODEL, "cpu", "none") == Decoding(
        vocab_size=2048,
        context=1024,
        rope_boundary=256,
        prefill_chunk=512,
        eos_token_ids=(2046, 2043),
        hidden_tokens={"<unk>": 0, "<s>": 1, "</s>": 2, **CHAT},
        cache=CacheShape(num_hidden_layers=4, num_key_value_heads=2, head_dim=32, dtype="float32", shared=True),
    )
    assert not read_decoding(CONFIG, MODEL, "portable", "none").cache.shared


def test_byte_tokens_marked_as_special_are_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_added_tokens_decoder()[3].content == "<0x00>"
    assert hidden_tokens(tmp_path) == {token: tokenizer.token_to_id(token) for token in SPECIAL}


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
    assert read_decoding(CONFIG, tmp_path, "cpu", "none").eos_token_ids == expected


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 1}]}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: its added_tokens are damaged"):
        read_decoding(CONFIG, tmp_path, "cpu", "none")


@pytest.mark.parametrize("eos", ["</s>", [7, 1.5], [-1], True])
def test_bad_end_tokens_are_named(tmp_path: Path, eos: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(
        ConfigError, match=f"generation_config.json: eos_token_id is {re.escape(repr(eos))}, expected a token id"
    ):
        read_decoding(CONFIG, tmp_path, "cpu", "none")
