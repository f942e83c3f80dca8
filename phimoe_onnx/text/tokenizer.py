"""tokenizer.json: which tokens are no text, and text to token ids and back, also as a stream of whole characters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from phimoe_onnx.errors import BundleError, ConfigError, GenerationError, brief
from phimoe_onnx.files import read_json, read_text
from phimoe_onnx.text.clean_up import CleanUp, clean_up

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of half a character


class Tokenizer:
    """The tokenizer of a bundle, whose manifest says which tokens are `hidden`: special ones that are no text.

    `clean_up` is the manifest's `clean_up_tokenization_spaces`.

    Raises:
        BundleError: `folder`/tokenizer.json is missing or cannot be read.

    """

    def __init__(self, folder: Path, hidden: Iterable[int], clean_up: bool = False) -> None:
        path = folder / "tokenizer.json"
        self.hidden = frozenset(hidden)
        self.clean_up = clean_up
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(read_text(path))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids
            self._anchor_length = len(self._decode(self._anchor))
        except ConfigError as error:
            raise BundleError(str(error)) from None
        except BaseException as error:
            raise BundleError(
                f"{path}: cannot be read as a tokenizer ({library_error(error)}); copy or export the bundle again"
            ) from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The text's token ids; `special` adds those that tokenizer.json puts around a text, such as the first <s>.

        Raises:
            GenerationError: the text holds half a character, as Python makes them of bytes that are no UTF-8.

        """
        check_characters(text, "the text")
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without the hidden tokens."""
        text = self._decode(ids)
        return clean_up(text) if self.clean_up else text

    def _decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([id for id in ids if id not in self.hidden], skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """The id of a token by its own text."""
        id = self._tokenizer.token_to_id(token)
        return None if id is None else int(id)

    def token_text(self, id: int) -> str:
        """A token's own text behind other text: "" where there is no such token, and a hidden one's name."""
        return (self._tokenizer.id_to_token(id) or "") if id in self.hidden else self._continue([id])

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A stream of the text that continues `prompt`."""
        return TextStream(self, prompt)

    def _continue(self, ids: list[int]) -> str:
        """The text of the ids where they follow other text: a decoder strips the space before the first word only."""
        return self._decode([*self._anchor, *ids])[self._anchor_length :]


class TextStream:
    """Token ids in, text out: each character once, and only when it is whole.

    A character may be spread over several byte tokens, so ids wait until they decode without a replacement character.
    Only those that wait are decoded, so a token costs the same however long the text is. Where spaces are cleaned up,
    text waits, too, while the next may still change it; `finish` gives what waits at the end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []
        self._clean_up = CleanUp() if tokenizer.clean_up else None
        self._follows = bool(prompt) and prompt[-1] not in tokenizer.hidden
        # a prompt may end inside a character: its bytes wait for the rest
        start = len(prompt)
        while (
            start
            and prompt[start - 1] not in tokenizer.hidden
            and tokenizer._decode([prompt[start - 1]]) == _INCOMPLETE
        ):
            start -= 1
        for id in prompt[start:]:
            self.add(id)

    def add(self, id: int) -> str:
        """The text that this token completes; often none."""
        if id in self._tokenizer.hidden:
            return ""
        self._waiting.append(id)
        text = self._tokenizer._continue(self._waiting) if self._follows else self._tokenizer._decode(self._waiting)
        if text.endswith(_INCOMPLETE):
            return ""
        self._waiting.clear()
        self._follows = True
        return self._clean_up.add(text) if self._clean_up else text

    def finish(self) -> str:
        """The text that waits for what may follow it, now that nothing does; half a character is left out."""
        return self._clean_up.finish() if self._clean_up else ""


def library_error(error: BaseException) -> str:
    """What the library tokenizers says of a file; an interrupt goes on.

    It raises bare Exceptions, and panics, which are no Exceptions and for whose type it has no name.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return brief(str(error))


def check_characters(text: str, name: str) -> None:
    """Refuses half characters, which no encoding has; Python makes them of bytes that are no UTF-8.

    Raises:
        GenerationError: `name` holds one.

    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"{name} holds {text[error.start]!r} at character {error.start}, which is half a character; "
            "expected Unicode, and as bytes UTF-8"
        ) from None


def hidden_tokens(folder: Path, text: str | None = None) -> dict[str, int]:
    """The special tokens of a checkpoint's tokenizer.json with their ids, but for the bytes `<0x00>` to `<0xFF>`.

    A checkpoint may mark its byte tokens as special; to skip those would drop newlines and emoji. Empty where there is
    no tokenizer.json. `text` is tokenizer.json where it is not to be the folder's own.

    Raises:
        ConfigError: tokenizer.json cannot be read, or its added_tokens are damaged.

    """
    path = folder / "tokenizer.json"
    tokenizer = json.loads(text) if text else read_json(path) if path.is_file() else {}
    added = tokenizer.get("added_tokens", [])
    try:
        special = {
            token["content"]: token["id"]
            for token in added
            if token["special"] and not _BYTE_TOKEN.fullmatch(token["content"])
        }
        if bad := [id for id in special.values() if type(id) is not int]:
            raise TypeError(f"the id {bad[0]!r}")
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: its added_tokens are damaged ({error!r}); download the checkpoint's file again"
        ) from None
    return special
