"""A conversation as a file: what /save writes and /load reads.

A file is written over only if nothing is lost by it: it holds the beginning of the same conversation.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from phimoe_onnx.errors import ConfigError, PhiMoEError
from phimoe_onnx.files import read_json
from phimoe_onnx.text.template import Message

WRITER = "phimoe-chat"


def save(file: str, messages: Sequence[Message]) -> Path:
    """Writes a conversation; returns the file's path.

    Raises:
        PhiMoEError: another conversation or somebody else's file is there, or it cannot be written.
    """
    text = json.dumps({"written_by": WRITER, "messages": list(messages)}, indent=2, ensure_ascii=False) + "\n"
    try:
        path = Path(file).expanduser()
        if not os.path.lexists(path):
            _write_new(path, text)
        elif load(file) == list(messages[: len(load(file))]):
            _replace(path.resolve(), text)
        else:
            raise PhiMoEError(f"{file}: holds another conversation, which stays; name another file")
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no name of a file; RuntimeError: no home for ~
        raise PhiMoEError(f"{file}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return path


def load(file: str) -> list[Message]:
    """The messages of a conversation that was saved.

    Raises:
        PhiMoEError: there is no such file, it cannot be read, or it is not what /save writes.
    """
    try:
        content = read_json(Path(file).expanduser())
    except ConfigError as error:
        raise PhiMoEError(str(error).partition("; expected a folder")[0]) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PhiMoEError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    messages = content.get("messages")
    if content.get("written_by") != WRITER or not isinstance(messages, list):
        raise PhiMoEError(f"{file}: is no conversation that /save wrote; name another file")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise PhiMoEError(f"{file}: message {number} is damaged, expected a role and a content")
        if not all(isinstance(value, str) for value in message.values()):
            raise PhiMoEError(f"{file}: message {number} is damaged, expected a role and a content as strings")
    return messages


def _write_new(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as opened:
        try:
            opened.write(text)
            opened.flush()
        except OSError:
            path.unlink()
            raise


def _replace(path: Path, text: str) -> None:
    """In one step, so that a full disk costs nothing."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
        os.chmod(draft, path.stat().st_mode & 0o777)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
