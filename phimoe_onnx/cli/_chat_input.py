"""What is read in a chat: which lines are one text, and whether it is a message or a command."""

from __future__ import annotations

import sys

from phimoe_onnx.cli._streams import BYTE_ORDER_MARK

PROMPT = "> "
QUOTES = '"""'  # around a text of several lines


def is_terminal() -> bool:
    """Whether somebody sits there, types and reads."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def parse(text: str) -> tuple[str, bool]:
    """The message or the command in a text, and whether it is a command: a single line that begins with "/"."""
    text = text.strip()
    if text.startswith(QUOTES):
        return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n"), False
    return text, text.startswith("/") and "\n" not in text


def is_whole(text: str) -> bool:
    """Whether no more lines belong to it: it has no opening quotes, or closing ones as well."""
    text = text.strip()
    return not text.startswith(QUOTES) or (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def read_lines() -> str:
    """The next line of standard input, or the lines between quotes; EOFError at the end."""
    try:
        text = input(PROMPT).removeprefix(BYTE_ORDER_MARK)
    except EOFError:
        print()
        raise
    while not is_whole(text):
        try:
            text += "\n" + input()
        except EOFError:
            break
    return text
