"""Files as every part of the package reads them: a text, a JSON object, and a SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phimoe_onnx.errors import ConfigError

_HASH_BLOCK = 1 << 20  # bytes


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`.

    Raises:
        ConfigError: the file is missing, unreadable or a Git LFS pointer.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device has no end
        raise ConfigError(f"{path}: cannot be read (it is no regular file)")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a folder with a {path.name} in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if text.startswith("version https://git-lfs"):
        raise ConfigError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in that folder")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigError: as for `read_text`, or the file holds no JSON object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            if advance:
                advance(len(block))
    return digest.hexdigest()
