"""Standard streams that no text breaks: what is not UTF-8 comes in as half characters, which generation names."""

from __future__ import annotations

import io
import os
import sys

from phimoe_onnx.errors import GenerationError

BYTE_ORDER_MARK = "\ufeff"


def forgive() -> None:
    """Lets bytes that are no text come in, and characters that the other side cannot show go out as "?"."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def read_text() -> str:
    """All of standard input without a byte-order mark and without its last line's end, which `echo` and editors add.

    Raises:
        GenerationError: standard input is closed.
    """
    if sys.stdin is None:
        raise GenerationError("standard input is closed; give the text as an argument")
    return sys.stdin.read().removeprefix(BYTE_ORDER_MARK).removesuffix("\n").removesuffix("\r")


def read_lines() -> list[str]:
    """The lines of standard input, each as it is, blank ones too; none where there is no character at all.

    Raises:
        GenerationError: standard input is closed.
    """
    if sys.stdin is None:
        raise GenerationError("standard input is closed; give the texts as arguments")
    text = sys.stdin.read().removeprefix(BYTE_ORDER_MARK)
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def abandon_output() -> None:
    """Lets what is still to be written go nowhere, so that Python does not complain about it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
