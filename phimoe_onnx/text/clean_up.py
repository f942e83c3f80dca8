"""Spaces that decoded text loses before punctuation, where tokenizer_config.json asks for it, also in a stream."""

from __future__ import annotations

# done one after the other over the whole text; the list is transformers' PreTrainedTokenizerBase.clean_up_tokenization
REPLACEMENTS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
# what a replacement may change: the strings themselves, and those that become one by " ' " losing its spaces
_SPANS = (*(old for old, _ in REPLACEMENTS), " n ' t", "  ' m", "  ' s", "  ' ve", "  ' re")
_STARTS = frozenset(span[:size] for span in _SPANS for size in range(1, len(span)))
_LONGEST = max(map(len, _SPANS)) - 1


def clean_up(text: str) -> str:
    """The text without the spaces."""
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    return text


class CleanUp:
    """The same in a stream: what the next text may still change is held back."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """The text that is now certain."""
        held = self._held + text
        end = len(held)
        for size in range(min(_LONGEST, end), 0, -1):
            if held[end - size :] in _STARTS:
                end -= size
                break
        # nor may the cut go through what is changed already: of those characters alone it may lie among
        while 0 < end < len(held) and held[end - 1] in " 'n":
            end -= 1
        self._held = held[end:]
        return clean_up(held[:end])

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        text, self._held = clean_up(self._held), ""
        return text
