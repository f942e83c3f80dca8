"""The chat template as plain prefix and suffix strings, for callers without Jinja."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimoe_onnx.bundle import ChatFormat
from phimoe_onnx.config import read_json

MARK = "\N{WHITE LARGE SQUARE}"  # stands for the content; no template has it


def chat_format(folder: Path) -> ChatFormat | None:
    """The format of the template in `folder`, or None where there is no template or plain strings cannot say it.

    Each role's turn is rendered alone and split at its content; the strings are kept only if putting them together again
    gives what the template gives for a conversation of every role.
    """
    template = _template(folder)
    if template is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def render(roles: Sequence[str], generation: bool) -> str:
        messages = [{"role": role, "content": MARK} for role in roles]
        return environment.from_string(template).render(messages=messages, add_generation_prompt=generation, bos_token="", eos_token="")

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
        format = ChatFormat(turns, prompt[len(plain) :])
        whole = "".join(format.turns[role][0] + MARK + format.turns[role][1] for role in conversation) + format.generation
        return format if render(conversation, True) == whole else None
    except TemplateError:
        return None


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
