"""The chat template as plain prefix and suffix strings, for callers without Jinja."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimoe_onnx.bundle import ChatFormat
from phimoe_onnx.files import read_json

MARK = (
    " \N{WHITE LARGE SQUARE}\n"  # stands for the content; no template has it, and one that trims its contents loses it
)


def chat_format(folder: Path) -> ChatFormat | None:
    """The format of the template in `folder`, or None where there is no template or plain strings cannot say it.

    Each role's turn is rendered alone and split at its content; the strings are kept only if putting them together
    again gives what the template gives for a conversation of every role, with and without contents.
    """
    template = _template(folder)
    if template is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def render(roles: Sequence[str], generation: bool, content: str = MARK, token: str = "") -> str:
        messages = [{"role": role, "content": content} for role in roles]
        values = {"messages": messages, "add_generation_prompt": generation, "bos_token": token, "eos_token": token}
        return environment.from_string(template).render(values)

    try:
        turns = {}
        for role in ("system", "user", "assistant"):
            prefix, found, suffix = render([role], False).partition(MARK)
            if found:
                turns[role] = (prefix, suffix)
        plain = render(["user"], False)
        prompt = render(["user"], True)
        if "user" not in turns or "assistant" not in turns or not prompt.startswith(plain):
            return None
        conversation = [role for role in ("system", "user", "assistant", "user") if role in turns]
        generation = prompt[len(plain) :]
        skipped = tuple(role for role in turns if render([role], True, "") == generation)
        format = ChatFormat(turns, generation, skipped)
        # the end token that some templates put behind a text without a generation prompt is none of the turn's
        same = (
            render(conversation, True, content, token=MARK) == _join(format, conversation, content)
            for content in (MARK, "")
        )
        return format if all(same) else None
    except TemplateError:
        return None


def _join(format: ChatFormat, roles: Sequence[str], content: str) -> str:
    """A conversation of these roles with the same content each, as a caller without Jinja puts it together."""
    turns = [format.turns[role] for role in roles if content or role not in format.skipped_when_empty]
    return "".join(prefix + content + suffix for prefix, suffix in turns) + format.generation


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
