"""The chat template as plain prefix and suffix strings, for callers without Jinja."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError

from phimoe_onnx.bundle import ChatFormat
from phimoe_onnx.text.special_tokens import token_texts
from phimoe_onnx.text.template import Message, parse, read_templates, render

# stands for the content; no template has it, and one that trims its contents loses it
MARK = " \N{WHITE LARGE SQUARE}\n"
ROLES = ("system", "user", "assistant")
# what templates look into: blank, begun by a line's end, and with a thought before the answer
CONTENTS = (MARK, "", f"\n{MARK}", "<think>a</think>b")


def chat_format(folder: Path) -> ChatFormat | None:
    """The format of the default template in `folder`, or None where there is no template or plain strings cannot say
    it.

    Each role's turn is rendered alone and split at its content; the strings are kept only if putting them together
    gives what the template gives for conversations of every role in every order, with and without contents.

    Raises:
        ConfigError: a file that may hold the template cannot be read.
    """
    found = _find_format(folder)
    return None if isinstance(found, str) else found


def why_no_format(folder: Path) -> str:
    """Why `chat_format` finds none, in words; nothing where it finds one."""
    found = _find_format(folder)
    return found if isinstance(found, str) else ""


def _find_format(folder: Path) -> ChatFormat | str:
    source, tokens = read_templates(folder).get("default"), token_texts(folder)
    if source is None:
        return "the checkpoint has no chat template"
    if "strftime_now" in source:  # strings say the same tomorrow
        return "its chat template asks for the date (strftime_now)"
    try:
        return _plain_strings(parse(source), tokens)
    except TemplateError as error:
        return f"its chat template fails: {error}"


def _plain_strings(template: Template, tokens: Mapping[str, Any]) -> ChatFormat | str:
    def prompt(messages: Sequence[Message], generation: bool, marked: bool = False) -> str:
        # the end token that some templates put behind a text without a generation prompt is none of the turn's
        ends = {"bos_token": "", "eos_token": ""}
        return render(template, messages, tokens if marked else {**tokens, **ends}, add_generation_prompt=generation)

    turns, refused = {}, {}
    for role in ROLES:
        try:
            prefix, found, suffix = prompt(_messages([role]), False).partition(MARK)
        except TemplateError as error:  # that role may not come first, or at all
            refused[role] = error
            continue
        if found:
            turns[role] = (prefix, suffix)
    for role in ("user", "assistant"):
        if role in refused:
            return f"its chat template refuses a first message of the role {role} ({refused[role]})"
        if role not in turns:
            return f"its chat template does not show a first message of the role {role} as it is"
    closed, opened = prompt(_messages(["user"]), False), prompt(_messages(["user"]), True)
    if not opened.startswith(closed):
        return "its chat template asks for an answer by other means than a text at the end"
    generation = opened[len(closed) :]
    skipped = tuple(role for role in turns if prompt(_messages([role], ""), True) == generation)
    format = ChatFormat(turns, generation, skipped)
    for messages in _conversations(tuple(turns)):
        try:
            same = prompt(messages, True, marked=True) == _join(format, messages)
        except TemplateError as error:
            return f"its chat template takes roles in some orders alone ({error})"
        if not same:
            return "its chat template changes a message by what it holds or by what stands beside it"
    return format


def _messages(roles: Sequence[str], content: str = MARK) -> list[Message]:
    return [{"role": role, "content": content} for role in roles]


def _conversations(roles: Sequence[str]) -> Iterator[list[Message]]:
    """Every order of up to three turns with every kind of content, and a long conversation."""
    for length, content in product((1, 2, 3), CONTENTS):
        for order in product(roles, repeat=length):
            yield _messages(order, content)
    yield _messages(["user", "assistant"] * 12 + ["user"])


def _join(format: ChatFormat, messages: Sequence[Message]) -> str:
    """A conversation as a caller without Jinja puts it together."""
    text = ""
    for message in messages:
        if message["content"] or message["role"] not in format.skipped_when_empty:
            prefix, suffix = format.turns[message["role"]]
            text += prefix + message["content"] + suffix
    return text + format.generation
