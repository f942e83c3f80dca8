"""Text that comes in pieces, with its lines broken between words where the terminal ends."""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.utils import get_cwidth


class WordWrap:
    """Writes pieces of a text on lines of `width` columns; a word is held back until it is whole.

    Only a space at the end of a line makes way for a break. Words longer than a line are left to the terminal, and wide
    characters, as Chinese and Japanese have them, are words of their own.
    """

    def __init__(self, write: Callable[[str], object], width: int) -> None:
        self._write, self._width = write, width
        self._column, self._word, self._inside = 0, "", False  # inside a word whose beginning is written

    def add(self, text: str) -> None:
        """Takes the next piece; a line's end brings out all that was held back."""
        for character in text:
            if not character.isspace():
                self._extend(character)
                continue
            self._flush()
            self._inside = False
            if character == "\n":
                self._column = 0
            elif self._column >= self._width:
                continue
            else:
                self._column += 1
            self._write(character)

    def _extend(self, character: str) -> None:
        wide = get_cwidth(character) > 1
        if wide:
            self._flush()
        self._word += character
        if wide or len(self._word) >= self._width:
            self._flush()
            self._inside = not wide

    def _flush(self) -> None:
        word, self._word = self._word, ""  # first, for Ctrl-C may come while it is written
        columns = get_cwidth(word)
        if self._column and not self._inside and self._column + columns > self._width:
            self._write("\n")
            self._column = 0
        self._write(word)
        self._column += columns
        if self._column > self._width:  # the terminal has broken it
            self._column %= self._width
