"""The text that a calibration takes through the model, as windows of tokens.

The package has one of its own: calibration.txt, documents of many kinds with a line of eight equals signs between them,
and calibration_chats.json, conversations that the checkpoint's template renders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.plan import CALIBRATION_TOKENS, LEAST_CALIBRATION_TOKENS
from phimoe_onnx.exporter.tokenizer import tokenizer_files
from phimoe_onnx.text.special_tokens import token_texts
from phimoe_onnx.text.template import parse, read_templates, render

DOCUMENTS = Path(__file__).with_name("calibration.txt")
CHATS = Path(__file__).with_name("calibration_chats.json")
SEPARATOR = "\n========\n"
SHORT, LONG = 2048, 8192  # tokens of a window, at the most


@dataclass(frozen=True)
class CalibrationText:
    """What a calibration reads.

    Attributes:
        name: the file's, or "default".
        sha256: of the text, in UTF-8 and hexadecimal.
        windows: token ids; each window is a text of its own.
    """

    name: str
    sha256: str
    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return sum(map(len, self.windows))

    def digest(self) -> str:
        """A SHA-256 of all that the calibration sees."""
        return hashlib.sha256(json.dumps(self.windows).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "method": "gptq",
            "text": self.name,
            "sha256": self.sha256,
            "tokens": self.tokens,
            "windows": self.digest(),
        }


def calibration_text(
    file: Path | None, folder: Path, config: PhiMoEConfig, tokens: int = CALIBRATION_TOKENS
) -> CalibrationText:
    """The windows of a text in UTF-8, or of the package's own where there is no file.

    Args:
        file: the text.
        folder: the checkpoint's, whose tokenizer and chat template count.
        config: its shape.
        tokens: how many are read, at the most.

    Raises:
        ExportError: the file cannot be read, is not UTF-8 or is too short.
        ConfigError: the tokenizer's files are damaged.
    """
    documents = _own_documents(folder) if file is None else [_read(file)]
    source = tokenizer_files(folder).get("tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_str(source or (folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    token_ids = [token for text in documents for token in tokenizer.encode(text).ids]
    if bad := [token for token in token_ids if token >= config.vocab_size]:
        raise ExportError(f"--calibrate: the tokenizer gives the token {bad[0]}, vocab_size is {config.vocab_size}")
    name = "default" if file is None else file.name
    if len(token_ids) < LEAST_CALIBRATION_TOKENS:
        raise ExportError(
            f"--calibrate {file or name}: has {len(token_ids)} tokens, at least {LEAST_CALIBRATION_TOKENS} are "
            f"needed and some 50,000 are better; leave FILE out for the text that comes with the package"
        )
    text = "\n\n".join(documents).encode()
    return CalibrationText(name, hashlib.sha256(text).hexdigest(), tuple(cut(token_ids, config, tokens)))


def cut(token_ids: Sequence[int], config: PhiMoEConfig, tokens: int = CALIBRATION_TOKENS) -> list[tuple[int, ...]]:
    """Windows that follow each other, half of the tokens in short ones and half in long ones where a model has both:
    short ones end at the rope boundary, long ones beyond it. Of a text of more than `tokens` those that are spread
    evenly over it.
    """
    boundary = config.longrope.original_max_position_embeddings if config.longrope else SHORT
    short, long = min(config.max_position_embeddings, boundary, SHORT), min(config.max_position_embeddings, LONG)
    lengths = [short] * (long // short) + ([long] if long > short else [])
    period, windows, left = sum(lengths), [], tokens
    periods = max(1, -(-len(token_ids) // period))
    kept = min(periods, max(1, tokens // period))
    for number in range(kept):
        start = number * periods // kept * period
        for length in lengths:
            size = min(length, left)
            windows.append(tuple(token_ids[start : start + size]))
            start, left = start + size, left - size
    return [window for window in windows if len(window) > 1]


def _own_documents(folder: Path) -> list[str]:
    return [*DOCUMENTS.read_text(encoding="utf-8").rstrip("\n").split(SEPARATOR), *_chats(folder)]


def _chats(folder: Path) -> list[str]:
    """The conversations as the checkpoint's template renders them; without one, or where it refuses them, their texts
    alone.
    """
    chats = json.loads(CHATS.read_text(encoding="utf-8"))
    source = read_templates(folder).get("default")
    try:
        if source is None:
            raise TemplateError("there is none")
        template, tokens = parse(source), token_texts(folder)
        return [render(template, chat, tokens, add_generation_prompt=False) for chat in chats]
    except TemplateError:
        return ["\n\n".join(message["content"] for message in chat) for chat in chats]


def _read(file: Path) -> str:
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ExportError(f"--calibrate {file}: is no file; expected a text in UTF-8")
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ExportError(f"--calibrate {file}: no such file; expected a text in UTF-8") from None
    except UnicodeDecodeError as error:
        raise ExportError(
            f"--calibrate {file}: is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it "
            f"as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"--calibrate {file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
