"""Whether the tokens of a checkpoint's files are tokens of its model."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from phimoe_onnx.config import PhiMoEConfig, read_token_id, read_token_ids
from phimoe_onnx.errors import ConfigError, brief
from phimoe_onnx.exporter.tokenizer import read_tokenizer
from phimoe_onnx.files import read_json, read_text
from phimoe_onnx.text.tokenizer import library_error

SHOWN = 3  # names of tokens in an error


def check_tokens(config: PhiMoEConfig, folder: Path) -> None:
    """Checks generation_config.json's special tokens and tokenizer.json against the rows of the embedding.

    Raises:
        ConfigError: a token has no row, or one of the files cannot be read.
    """
    path = folder / "generation_config.json"
    if path.exists():
        generation = read_json(path)
        for key in ("bos_token_id", "pad_token_id"):
            read_token_id(generation, key, config.vocab_size, str(path))
        read_token_ids(generation, "eos_token_id", config.vocab_size, str(path))
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    text = read_tokenizer(folder) or read_text(path)  # as the bundle will have it
    try:
        tokens = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except BaseException as error:
        raise ConfigError(
            f"{path}: cannot be read as a tokenizer ({library_error(error)}); download the checkpoint's file again"
        ) from None
    beyond = sorted((id, token) for token, id in tokens.items() if id >= config.vocab_size)
    if beyond:
        named = ", ".join(f"{brief(token)} ({id})" for id, token in beyond[:SHOWN])
        more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
        raise ConfigError(
            f"{path}: {named}{more} have no row in the model, whose vocab_size is {config.vocab_size}; resize its "
            f"embeddings (transformers' resize_token_embeddings) and save it again, or remove these tokens"
        )
