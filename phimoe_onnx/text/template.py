"""Chat messages to one prompt, by the template that the bundle carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimoe_onnx.errors import BundleError, ConfigError, GenerationError
from phimoe_onnx.files import read_json

Message = Mapping[str, str]


class ChatTemplate:
    """chat_template.jinja, or else `chat_template` of tokenizer_config.json, run in jinja2's sandbox.

    Raises:
        BundleError: the template cannot be parsed, or tokenizer_config.json cannot be read.

    """

    def __init__(self, folder: Path) -> None:
        try:
            config = read_json(folder / "tokenizer_config.json")
        except ConfigError as error:
            raise BundleError(str(error)) from None
        template = folder / "chat_template.jinja"
        source = template.read_text(encoding="utf-8") if template.is_file() else _default(config.get("chat_template"))
        # trim_blocks, lstrip_blocks, loopcontrols and the names below are what transformers gives a template
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        self._tokens = {name: _text(config.get(name)) for name in ("bos_token", "eos_token")}
        try:
            self._template = environment.from_string(source) if source else None
        except TemplateError as error:
            raise BundleError(f"{folder}: its chat template does not parse: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the assistant's next answer.

        Raises:
            GenerationError: the bundle has no template, a message is not {"role": str, "content": str}, or the template
                refuses the messages.

        """
        if self._template is None:
            raise GenerationError("the bundle has no chat template; give the prompt as a string")
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise GenerationError(f'message {message!r}: expected {{"role": "...", "content": "..."}}')
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is foreign code and may fail in any way
            raise GenerationError(f"the bundle's chat template refuses the messages: {error}") from error


def _default(template: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones."""
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _text(token: Any) -> str:
    """tokenizer_config.json writes a token as a string, an object with `content`, or null."""
    return str(token["content"]) if isinstance(token, dict) else token or ""


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
