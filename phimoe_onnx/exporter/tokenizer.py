"""The bundle's tokenizer files: tokenizer.json alone says which ids a text has, and says what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from phimoe_onnx.errors import ConfigError, brief
from phimoe_onnx.files import read_json, read_text
from phimoe_onnx.text.special_tokens import (
    content,
    is_llama,
    read_special_tokens,
    read_tokenizer_config,
    token_texts,
)
from phimoe_onnx.text.template import TOOL_USE, read_templates
from phimoe_onnx.text.tokenizer import hidden_tokens, library_error

_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # the library prints what it ignores
_MAKE = (
    "make it with the package transformers: "
    "AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)"
)


def check_text(folder: Path) -> None:
    """Holds the tokenizer and the chat templates of a checkpoint against what the runtime will ask of them.

    Raises:
        ConfigError: as for `tokenizer_files`.
    """
    tokenizer_files(folder)
    token_texts(folder)


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The texts of the tokenizer's files that a bundle has in another form than the checkpoint in `folder`, by name.

    tokenizer.json gets the tokens that only tokenizer_config.json or special_tokens_map.json name, and the first and
    last token that `add_bos_token` and `add_eos_token` ask for. Of several chat templates the default goes to
    tokenizer_config.json and the one for tools into a file of its own: lists and folders of templates are not what
    onnxruntime-genai and a manifest take.

    Raises:
        ConfigError: tokenizer.json is missing, or a file is damaged or contradicts another.
    """
    files = {}
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer
    config, templates = read_tokenizer_config(folder), read_templates(folder)
    if "tool_use" in templates or isinstance(config.get("chat_template"), list):
        config.pop("chat_template", None)
        if default := templates.get("default"):
            config["chat_template"] = default
        files["tokenizer_config.json"] = json.dumps(config, indent=2) + "\n"
        if tool_use := templates.get("tool_use"):
            files[TOOL_USE] = tool_use
    return files


def read_tokenizer(folder: Path) -> str | None:
    """The tokenizer.json that gives alone the ids that transformers gives, or None where the checkpoint's own does.

    Raises:
        ConfigError: as for `tokenizer_files`.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        slow = "; there is a tokenizer.model, which is the slow tokenizer's" if _has_slow(folder) else ""
        raise ConfigError(f"{path}: no such file{slow}; {_MAKE}")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(read_text(path))
        before = tokenizer.to_str()
        _check_ids(tokenizer, path)
        tokenizer.decode(tokenizer.encode("a", add_special_tokens=False).ids)
    except ConfigError:
        raise
    except BaseException as error:
        raise ConfigError(
            f"{path}: cannot be read as a tokenizer ({library_error(error)}); download the checkpoint's file again"
        ) from None
    config = read_tokenizer_config(folder)
    if config.get("split_special_tokens"):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: split_special_tokens is {brief(config['split_special_tokens'])}, "
            "which no tokenizer.json can say, and with which no chat works; take it out"
        )
    try:
        added = _add_tokens(tokenizer, config, read_special_tokens(folder))
        if is_llama(folder, config):
            _frame(tokenizer, folder, config)
        else:
            _set_prefix_space(tokenizer, config)
        after = tokenizer.to_str()
    except ConfigError:
        raise
    except BaseException as error:
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: its tokens are damaged ({library_error(error)}); "
            "download the file again"
        ) from None
    _check_written(tokenizer, after, added, folder / "tokenizer_config.json")
    return None if after == before else after


def _check_ids(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Refuses added tokens to which the library gives other ids than the file, which it does without a word.

    Raises:
        ConfigError: there is one.
    """
    for token in read_json(path)["added_tokens"]:
        found = tokenizer.token_to_id(token["content"])
        if found is None or found != token["id"] or tokenizer.id_to_token(found) != token["content"]:
            raise ConfigError(
                f"{path}: its added token {brief(token['content'])} has the id {brief(token['id'])}, but its "
                f"vocabulary makes it {found}; download the checkpoint's file again"
            )


def all_hidden_tokens(folder: Path) -> dict[str, int]:
    """The special tokens of the checkpoint in `folder`, by the file and by the configuration: transformers skips both.

    Raises:
        ConfigError: as for `tokenizer_files`.
    """
    written = read_tokenizer(folder)
    return hidden_tokens(folder) | hidden_tokens(folder, written)


def _has_slow(folder: Path) -> bool:
    return (folder / "tokenizer.model").exists()


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, Any]) -> list[str]:
    """Adds what tokenizer.json lacks: the tokens of `added_tokens_decoder` by their numbers, then special ones.

    Returns their texts, and those of tokens that got other flags.
    """
    named = [token for value in special.values() for token in (value if isinstance(value, list) else [value])]
    texts = {content(token) for token in named}
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict) or not all(isinstance(token, dict) for token in declared.values()):
        raise TypeError("added_tokens_decoder holds what is no object")
    wanted = [declared[id] for id in sorted(declared, key=int)]
    known = {content(token) for token in wanted}
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # one that is there keeps its flags, unless it is named with flags
    wanted += [
        token for token in named if content(token) not in known and (isinstance(token, dict) or token not in there)
    ]
    tokens = []
    for token in wanted:
        flags = {key: token[key] for key in _FLAGS if key in token} if isinstance(token, dict) else {"content": token}
        if flags.setdefault("special", False) is False:  # what is neither true nor false is refused by the library
            flags["special"] = flags["content"] in texts
        tokens.append(AddedToken(**flags))
    tokenizer.add_tokens(tokens)
    return [token.content for token in tokens]


def _check_written(tokenizer: tokenizers.Tokenizer, text: str, added: list[str], path: Path) -> None:
    """Refuses what cannot be written: a token whose flags contradict tokenizer.json is in memory a bit of both.

    Raises:
        ConfigError: the tokenizer in `text` gives other ids than the one in memory.
    """
    try:
        written = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        raise ConfigError(
            f"{path.with_name('tokenizer.json')}: contradicts itself ({library_error(error)}); download the "
            "checkpoint's file again"
        ) from None
    for token in added:
        probe = f"a{token}a {token} a\n{token}\n"
        if written.encode(probe).ids != tokenizer.encode(probe).ids:
            raise ConfigError(
                f"{path}: its token {brief(token)} contradicts the one of tokenizer.json; make the two agree, or "
                f"take it out of added_tokens_decoder"
            )


def _frame(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Puts the first and the last token around a text, and nothing else: what a LlamaTokenizer does."""
    path = folder / "tokenizer_config.json"
    if config.get("add_prefix_space") is not None:
        raise ConfigError(
            f"{path}: add_prefix_space is {config['add_prefix_space']}, for which transformers makes another tokenizer "
            f"from tokenizer.model; {_MAKE}, and take add_prefix_space out of tokenizer_config.json"
        )
    special = read_special_tokens(folder)
    ids: dict[str, list[str]] = {"bos_token": [], "eos_token": []}
    for name, default in (("bos_token", True), ("eos_token", False)):
        if config.get(f"add_{name}", default):
            text = content(special.get(name))
            if text is None:
                raise ConfigError(f"{path}: add_{name} is true, but there is no {name}; name one, or set it to false")
            ids[name] = [text]
    first, last = ids["bos_token"], ids["eos_token"]
    if first or last or tokenizer.post_processor is not None:
        single = [*first, "$A", *last]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[f"{part}:0" for part in single],
            pair=[f"{part}:0" for part in single] + [f"{part}:1" for part in (*first, "$B", *last)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*first, *last])],
        )


def _set_prefix_space(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Other tokenizers take `add_prefix_space` of tokenizer_config.json, false where it has none."""
    state = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    wanted = config.get("add_prefix_space", False)
    if state.get("type") == "ByteLevel" and isinstance(wanted, bool) and state["add_prefix_space"] != wanted:
        state["add_prefix_space"] = wanted
        del state["type"]
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(**state)
