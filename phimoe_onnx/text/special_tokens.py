"""The special tokens that a checkpoint's files name, as transformers gathers them from its three places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phimoe_onnx.errors import ConfigError, brief
from phimoe_onnx.files import read_json

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "additional_special_tokens",
)
LLAMA = (None, "LlamaTokenizer", "LlamaTokenizerFast")  # as which transformers opens a PhiMoE's tokenizer by default
# those that give tokenizer.json's ids, and no code of their own
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "GPT2TokenizerFast")
LLAMA_DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing where there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def is_llama(folder: Path, config: dict[str, Any]) -> bool:
    """Whether transformers opens the tokenizer as a LlamaTokenizer, and not as one that gives tokenizer.json's ids.

    Raises:
        ConfigError: config.json cannot be read, or the tokenizer is of a class with code of its own.
    """
    name, file = config.get("tokenizer_class"), "tokenizer_config.json"
    if name is None and (folder / "config.json").is_file():
        name, file = read_json(folder / "config.json").get("tokenizer_class"), "config.json"
    if name not in (*LLAMA, *PLAIN):
        raise ConfigError(
            f"{folder / file}: tokenizer_class is {brief(name)}, expected one of {', '.join((*LLAMA[1:], *PLAIN))}; "
            f"see in the package transformers that it gives the ids of its tokenizer.json, and name one of these"
        )
    return name in LLAMA


def read_special_tokens(folder: Path) -> dict[str, Any]:
    """By name ("bos_token", ...), a token or a list of tokens; a token is a string or an object with `content`.

    special_tokens_map.json counts only beside a tokenizer_config.json without `added_tokens_decoder`, before which
    versions wrote it.

    Raises:
        ConfigError: a file cannot be read, or a token is neither.
    """
    config = read_tokenizer_config(folder)
    tokens: dict[str, Any] = dict(LLAMA_DEFAULTS) if is_llama(folder, config) else {}
    extra = config.get("extra_special_tokens")
    extra = extra if isinstance(extra, dict) else {}
    names = (*NAMES, *extra)
    tokens |= {name: config[name] for name in NAMES if name in config} | extra
    older = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and older.is_file():
        for name, value in read_json(older).items():
            if name == "additional_special_tokens" and isinstance(value, list):
                known = tokens.get(name)
                known = known if isinstance(known, list) else []
                tokens[name] = [*known, *(token for token in value if token not in known)]
            elif name in names:
                tokens[name] = value
    several = tokens.get("additional_special_tokens")
    if not isinstance(several, list | None):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: additional_special_tokens is {brief(several)}, expected a list"
        )
    for name, value in tokens.items():
        for token in value if name == "additional_special_tokens" and isinstance(value, list) else [value]:
            if value is not None and content(token) is None:
                raise ConfigError(
                    f"{folder / 'tokenizer_config.json'}: {name} holds {brief(token)}, expected a token's text"
                )
    return {name: value for name, value in tokens.items() if value}


def content(token: Any) -> str | None:
    """The text of a token, None where it is none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def token_texts(folder: Path) -> dict[str, str | list[str]]:
    """The texts of the special tokens, as a chat template knows them; those that are not set are absent.

    Raises:
        ConfigError: as for `read_special_tokens`.
    """
    texts: dict[str, str | list[str]] = {}
    for name, value in read_special_tokens(folder).items():
        text = [content(token) or "" for token in value] if isinstance(value, list) else content(value)
        if text:
            texts[name] = text
    return texts
