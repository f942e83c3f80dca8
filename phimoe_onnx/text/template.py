"""Chat messages to one prompt, by the Jinja template that a checkpoint and its bundle carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError

from phimoe_onnx.errors import BundleError, ConfigError, GenerationError, brief
from phimoe_onnx.files import read_text
from phimoe_onnx.text.sandbox import BUDGET, Budget, ChatEnvironment
from phimoe_onnx.text.special_tokens import read_tokenizer_config, token_texts

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

TOOL_USE = "chat_template.tool_use.jinja"  # in a bundle, whose files lie side by side
ADDITIONAL = "additional_chat_templates"  # in a checkpoint
_ENVIRONMENT = ChatEnvironment()


class ChatTemplate:
    """A bundle's templates, ready for messages. One that does not parse is an error only when it is used.

    Raises:
        BundleError: a file that they stand in cannot be read.

    """

    def __init__(self, folder: Path) -> None:
        try:
            self._sources, self._tokens = read_templates(folder), token_texts(folder)
        except ConfigError as error:
            raise BundleError(str(error)) from None
        self._folder = folder
        self._parsed: dict[str, Template] = {}

    def render(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """The prompt that asks for the assistant's next answer.

        Args:
            messages: each with a "role"; everything else is the template's to know: a "content" that is a string, None
                or a list of parts {"type": "text", "text": ...}, "tool_calls", ...
            tools: JSON schemas of functions that the model may call.

        Raises:
            GenerationError: the bundle has no template, a message or a tool is malformed, or the template refuses them.
            BundleError: the template does not parse.

        """
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise GenerationError("the bundle has no chat template; give the prompt as a string")
        for message in messages:
            _check_message(message)
        if not isinstance(tools, list | tuple | None):
            raise GenerationError(f"tools is {brief(tools)}, expected a list of JSON schemas")
        for tool in tools or ():
            if not isinstance(tool, Mapping):
                raise GenerationError(f"tools holds {brief(tool)}, expected a JSON schema as a dict")
        template = self._template(name)
        try:
            return render(template, messages, self._tokens, tools=tools)
        except TemplateError as error:
            raise GenerationError(f"the bundle's chat template refuses the messages: {error}") from error

    def _template(self, name: str) -> Template:
        if name not in self._parsed:
            try:
                self._parsed[name] = parse(self._sources[name])
            except TemplateError as error:
                raise BundleError(f"{self._folder}: its chat template does not parse: {error}") from None
        return self._parsed[name]


def read_templates(folder: Path) -> dict[str, str]:
    """The sources of the templates "default" and "tool_use", as far as there are any.

    They are chat_template.jinja and the files of additional_chat_templates, or else `chat_template` of
    tokenizer_config.json: one template, or a list of named ones. A bundle keeps the second in a file beside the first.

    Raises:
        ConfigError: a file is there and cannot be read, or a list of templates is damaged.
    """
    config = read_tokenizer_config(folder)
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / ADDITIONAL).glob("*.jinja"))}
    templates: dict[str, Any] = {name: read_text(path) for name, path in files.items() if path.is_file()}
    if not templates:
        templates = _named(folder, config.get("chat_template"))
    if (folder / TOOL_USE).is_file():
        templates["tool_use"] = read_text(folder / TOOL_USE)
    return {name: templates[name] for name in ("default", "tool_use") if templates.get(name)}


def _named(folder: Path, template: Any) -> dict[str, Any]:
    entries = template if isinstance(template, list) else [{"name": "default", "template": template}]
    for entry in entries:
        named = isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        if not named or not isinstance(entry["template"], str | None) or not _is_text(entry["template"] or ""):
            raise ConfigError(
                f"{folder / 'tokenizer_config.json'}: chat_template holds {str(entry)[:80]}, expected one template, "
                'or a list of {"name": ..., "template": ...}'
            )
    return {entry["name"]: entry["template"] for entry in entries}


def _is_text(text: str) -> bool:
    """Whether there is no half character, which JSON can spell and no file can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def parse(source: str) -> Template:
    """The template, to be run in jinja2's sandbox.

    Raises:
        TemplateError: the source cannot be parsed.

    """
    token = BUDGET.set(Budget())
    try:
        return _ENVIRONMENT.from_string(source)
    except TemplateError:
        raise
    except Exception as error:
        raise _foreign(error) from error
    finally:
        BUDGET.reset(token)


def render(
    template: Template,
    messages: Sequence[Message],
    tokens: Mapping[str, Any],
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """What the template makes of the messages; `tokens` are the special ones by name, as `token_texts` gives them.

    Raises:
        TemplateError: the template refuses the messages, fails, or does not end within its budget.

    """
    values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    token = BUDGET.set(Budget(values))
    try:
        text = template.render(**{**values, **tokens})
        text.encode("utf-8")
    except TemplateError:
        raise
    except UnicodeEncodeError as error:
        raise TemplateError(f"its text holds {text[error.start]!r}, half a character") from None
    except Exception as error:
        raise _foreign(error) from error
    finally:
        BUDGET.reset(token)
    return text


def _foreign(error: Exception) -> TemplateError:
    """A template is foreign code and may fail in any way; callers have one error to catch."""
    return TemplateError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _check_message(message: Any) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise GenerationError(f'message {brief(message)}: expected {{"role": "...", "content": "..."}}')
    content = message.get("content")
    if not isinstance(content, str | list | tuple | None):
        raise GenerationError(f"message {brief(message)}: its content is a {type(content).__name__}, expected a string")
    for part in content if isinstance(content, list | tuple) else ():
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise GenerationError(f'message part {brief(part)}: expected {{"type": "text", "text": "..."}}')
