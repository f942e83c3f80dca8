"""The commands of a chat. Each takes the chat and what stands behind its name, and returns what is to be said."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.console import RenderableType
from rich.table import Table

from phimoe_onnx.cli import _chat_file
from phimoe_onnx.cli._common import GENERATION
from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.conversation import Conversation
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.runtime.request import Options, make_request
from phimoe_onnx.text.template import ChatTemplate, Message

LEAVE = ("/bye", "/quit", "/exit")
NONE = "none"  # what takes a value away
KEYS = '''\
Enter sends a message. Alt-Enter begins a new line, and so does Enter between
""" and """. A pasted text of several lines is one message. The up arrow brings
earlier messages back, Tab completes a command, Ctrl-C stops an answer.'''


@dataclass
class Chat:
    """What a chat is about; `options` are those of every answer to come."""

    model: PhiMoE
    conversation: Conversation
    options: Options


class Command(NamedTuple):
    """A command: what stands behind its name, what it does in words, and what does it."""

    argument: str
    help: str
    run: Callable[[Chat, str], RenderableType]


def run(chat: Chat, line: str) -> RenderableType:
    """Runs the command in a line that begins with "/".

    Raises:
        PhiMoEError: there is no such command, or it cannot be done; the chat is as it was.
    """
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        hint = _nearest(name, [*COMMANDS, *LEAVE]) or "/help lists them"
        raise GenerationError(f'{name} is no command; {hint}. A message that begins with "/" goes between """ and """')
    return COMMANDS[name].run(chat, argument.strip())


def check_template(bundle: Path, system: str | None) -> None:
    """Raises GenerationError or BundleError if the bundle's chat template does not take a conversation that begins with
    this system message.
    """
    ChatTemplate(bundle).render([*_system_message(system), {"role": "user", "content": "a"}])


def _help(chat: Chat, argument: str) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        grid.add_row(f"{name} {command.argument}", command.help)
    grid.add_row(", ".join(LEAVE), "leave; so does Ctrl-D")
    whole = Table.grid()
    for part in (grid, "", KEYS):
        whole.add_row(part)
    return whole


def _reset(chat: Chat, argument: str) -> RenderableType:
    chat.conversation.reset()
    return "The conversation is forgotten." + (" The system message stays." if chat.conversation.messages else "")


def _system(chat: Chat, argument: str) -> RenderableType:
    said = chat.conversation.messages
    before = [message for message in said[:1] if message["role"] == "system"]
    if not argument:
        return before[0]["content"] if before else "There is no system message."
    text = None if argument == NONE else argument
    messages = [*_system_message(text), *said[len(before) :]]
    chat.model.encode([*messages, {"role": "user", "content": "a"}])  # whether the template takes it
    chat.conversation.messages = messages
    return "There is no system message any more." if text is None else "The system message is set."


def _set(chat: Chat, argument: str) -> RenderableType:
    name, _, value = argument.partition(" ")
    name = name.replace("-", "_")
    if name and name not in GENERATION:
        raise GenerationError(f"{name} is no option; {_nearest(name, GENERATION) or '/set lists them'}")
    if value.strip():
        options = cast("Options", {**chat.options, name: _read(name, value.strip())})
        others: Any = options
        make_request([0], chat.model.decoding.context, **others)
        chat.options = options
    return _shown(chat.options, [name] if name else GENERATION)


def _save(chat: Chat, argument: str) -> RenderableType:
    path = _chat_file.save(_file(argument), chat.conversation.messages)
    return f"{path}: {_count(len(chat.conversation.messages))} saved."


def _load(chat: Chat, argument: str) -> RenderableType:
    messages, context = _chat_file.load(_file(argument)), chat.model.decoding.context
    tokens = len(chat.model.encode(messages, argument, limit=context)) if messages else 0
    if tokens >= context:
        raise GenerationError(f"{argument}: has {tokens} tokens, which leaves no room in the context of {context}")
    chat.conversation.messages = messages
    return f"{argument}: {_count(len(messages))}, {tokens} of {context} tokens. Go on."


COMMANDS = {
    "/help": Command("", "say this", _help),
    "/reset": Command("", "forget the conversation, but for the system message", _reset),
    "/system": Command("TEXT", f"set the system message ({NONE}: remove it); alone, show it", _system),
    "/set": Command("OPTION VALUE", f"set an option of the answers ({NONE}: its default); alone, show them", _set),
    "/save": Command("FILE", "write the conversation to a file", _save),
    "/load": Command("FILE", "go on with a conversation that was saved", _load),
}


def _system_message(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]


def _read(name: str, value: str) -> Any:
    """An option's value as it was typed."""
    option = GENERATION[name]
    if value == NONE:
        return option.default
    try:
        return tuple(shlex.split(value)) if isinstance(option.default, tuple) else option.read(value)
    except ValueError as error:
        expected = f"texts, in quotes where they have spaces ({error})"
        if option.read is not str:
            expected = "an integer" if option.read is int else "a number"
        raise GenerationError(f"{name} is {value!r}, expected {expected} or {NONE}") from None


def _shown(options: Options, names: Iterable[str]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for name in names:
        value = cast("dict[str, Any]", options)[name]
        shown = shlex.join(value) if isinstance(value, tuple | list) else "" if value is None else str(value)
        grid.add_row(name, shown or NONE, GENERATION[name].help)
    return grid


def _file(argument: str) -> str:
    if not argument:
        raise GenerationError("a file's name is missing, as in /save talk.json")
    return argument


def _count(messages: int) -> str:
    return f"{messages} message" + ("" if messages == 1 else "s")


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {found[0]}?" if found else ""
