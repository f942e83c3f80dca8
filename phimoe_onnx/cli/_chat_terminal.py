"""A chat's terminal: a line editor by prompt_toolkit, with a history that outlives the session."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import confirm

from phimoe_onnx.cli._chat_input import PROMPT, is_whole
from phimoe_onnx.cli._common import put
from phimoe_onnx.cli._word_wrap import WordWrap


def reader(commands: Iterable[str], **streams: Any) -> Callable[[], str]:
    """What reads a text that was typed or pasted, and sent with Enter. It raises EOFError at the end, and Ctrl-C asks
    whether this is it. Tab completes `commands`; `streams` are prompt_toolkit's `input` and `output`, if not its own.
    """
    session: PromptSession[str] = PromptSession(
        multiline=True,  # a pasted text keeps its lines; what Enter does is in _keys
        prompt_continuation="  ",
        key_bindings=_keys(),
        history=open_history(state_folder()),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        **streams,
    )

    def read() -> str:
        while True:
            try:
                return session.prompt(PROMPT)
            except KeyboardInterrupt:
                if _leave():
                    raise EOFError from None

    return read


def writer() -> Callable[[str], None]:
    """What shows the pieces of an answer."""
    return WordWrap(put, shutil.get_terminal_size().columns).add


def _leave() -> bool:
    try:
        return confirm("Leave the chat?")
    except (KeyboardInterrupt, EOFError):  # again Ctrl-C, or Ctrl-D
        return True


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        if is_whole(event.current_buffer.text):
            event.current_buffer.validate_and_handle()
        else:
            begin_line(event)

    @keys.add("escape", "enter")  # Alt-Enter
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def state_folder() -> Path | None:
    """Where programs keep what they remember: $XDG_STATE_HOME, else ~/.local/state, on Windows %LOCALAPPDATA%; None
    without a home.

    https://specifications.freedesktop.org/basedir-spec/latest
    """
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = Path("~").expanduser() if os.path.expanduser("~") != "~" else None
    return home / ".local" / "state" if home and home.is_dir() else None


class _Kept(FileHistory):
    """A history whose file may be unreadable or unwritable; then it lasts as long as the session."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return super().load_history_strings()
        return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            os.close(os.open(self.filename, os.O_WRONLY | os.O_CREAT, 0o600))  # what was said is nobody else's
            super().store_string(string)


def open_history(state: Path | None) -> History:
    """Earlier messages, kept in a file of the folder `state` where that can be."""
    if state is None:
        return InMemoryHistory()
    file = state / "phimoe-onnx" / "chat_history"
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if file.exists() and not file.is_file():  # a pipe would be waited for
        return InMemoryHistory()
    return _Kept(file)
