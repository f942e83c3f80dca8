"""Chat messages to one prompt, by the Jinja template that a checkpoint and its bundle carry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimoe_onnx.errors import BundleError, ConfigError, GenerationError
from phimoe_onnx.files import read_json, read_text

Message = Mapping[str, str]


class ChatTemplate:
    """A bundle's template, ready for messages.

    Raises:
        BundleError: the template cannot be parsed, or the file that it stands in cannot be read.

    """

    def __init__(self, folder: Path) -> None:
        try:
            source, self._tokens = read_template(folder)
            self._template = parse(source) if source else None
        except ConfigError as error:
            raise BundleError(str(error)) from None
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
            return render(self._template, messages, add_generation_prompt=True, **self._tokens)
        except TemplateError as error:
            raise GenerationError(f"the bundle's chat template refuses the messages: {error}") from error


def read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The template's source, None where there is none, and the texts of `bos_token` and `eos_token`.

    The source is chat_template.jinja, or else `chat_template` of tokenizer_config.json.

    Raises:
        ConfigError: one of the two files is there and cannot be read.

    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    template = folder / "chat_template.jinja"
    source = read_text(template) if template.is_file() else _default(config.get("chat_template"))
    return source or None, {name: _content(config.get(name)) for name in ("bos_token", "eos_token")}


def parse(source: str) -> Template:
    """The template, to be run in jinja2's sandbox.

    Raises:
        TemplateError: the source cannot be parsed.

    """
    with _template_errors():
        return _ENVIRONMENT.from_string(source)


def render(template: Template, messages: Sequence[Message], *, add_generation_prompt: bool, **tokens: str) -> str:
    """What the template makes of the messages; `tokens` are the texts of `bos_token` and `eos_token`.

    Raises:
        TemplateError: the template refuses the messages or fails.

    """
    with _template_errors():
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    """A template is foreign code and may fail in any way; callers have one error to catch."""
    try:
        yield
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateError(str(error)) from error


def _default(template: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _content(token: Any) -> str:
    """tokenizer_config.json writes a token as a string, an object with `content`, or null."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


# trim_blocks, lstrip_blocks, loopcontrols and raise_exception are what transformers gives a template
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
