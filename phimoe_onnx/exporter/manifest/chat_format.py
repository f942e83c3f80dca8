"""The chat template as plain prefix and suffix strings, for callers without Jinja."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Template, TemplateError

from phimoe_onnx.bundle import ChatFormat
from phimoe_onnx.text.template import parse, read_template, render

MARK = (
    " \N{WHITE LARGE SQUARE}\n"  # stands for the content; no template has it, and one that trims its contents loses it
)


def chat_format(folder: Path) -> ChatFormat | None:
    """The format of the template in `folder`, or None where there is no template or plain strings cannot say it.

    Each role's turn is rendered alone and split at its content; the strings are kept only if putting them together
    again gives what the template gives for a conversation of every role, with and without contents.

    Raises:
        ConfigError: a file that may hold the template cannot be read.
    """
    source, _ = read_template(folder)
    if source is None:
        return None
    try:
        return _plain_strings(parse(source))
    except TemplateError:
        return None


def _plain_strings(template: Template) -> ChatFormat | None:
    def prompt(roles: Sequence[str], generation: bool, content: str = MARK, token: str = "") -> str:
        messages = [{"role": role, "content": content} for role in roles]
        return render(template, messages, add_generation_prompt=generation, bos_token=token, eos_token=token)

    turns = {}
    for role in ("system", "user", "assistant"):
        prefix, found, suffix = prompt([role], False).partition(MARK)
        if found:
            turns[role] = (prefix, suffix)
    closed, opened = prompt(["user"], False), prompt(["user"], True)
    if "user" not in turns or "assistant" not in turns or not opened.startswith(closed):
        return None
    generation = opened[len(closed) :]
    skipped = tuple(role for role in turns if prompt([role], True, "") == generation)
    format = ChatFormat(turns, generation, skipped)
    conversation = [role for role in ("system", "user", "assistant", "user") if role in turns]
    # the end token that some templates put behind a text without a generation prompt is none of the turn's
    same = (
        prompt(conversation, True, content, token=MARK) == _join(format, conversation, content)
        for content in (MARK, "")
    )
    return format if all(same) else None


def _join(format: ChatFormat, roles: Sequence[str], content: str) -> str:
    """A conversation of these roles with the same content each, as a caller without Jinja puts it together."""
    turns = [format.turns[role] for role in roles if content or role not in format.skipped_when_empty]
    return "".join(prefix + content + suffix for prefix, suffix in turns) + format.generation
