"""phimoe-chat: a conversation in the terminal, or with lines that come from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType

import phimoe_onnx
from phimoe_onnx.cli._chat_input import is_terminal, parse, read_lines
from phimoe_onnx.cli._common import (
    Parser,
    add_generation_options,
    check_options,
    generation_options,
    put,
    run,
    speed,
    stream,
)
from phimoe_onnx.cli._start import imports
from phimoe_onnx.errors import GenerationError, PhiMoEError

if TYPE_CHECKING:
    from phimoe_onnx.cli._chat_commands import Chat
    from phimoe_onnx.text.template import Message


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        "phimoe-chat",
        "Talk to a PhiMoE bundle. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. Without a terminal "
        "each line of standard input is a message; answers go to standard output, all else to standard error.",
        "austen-int4",
        'austen-int4 --system "Answer in one sentence." --temperature 0.8',
        "austen-int4 < messages.txt > answers.txt",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote")
    add_generation_options(parser)
    return run(_chat, parser, argv)


def _chat(arguments: argparse.Namespace) -> None:
    if sys.stdin is None:
        raise GenerationError("standard input is closed; a chat needs it")
    with imports():
        load = phimoe_onnx.PhiMoE.load
        from phimoe_onnx.cli._chat_commands import COMMANDS, LEAVE, Chat, check_template

        read, writer = read_lines, _plain
        if is_terminal():
            from phimoe_onnx.cli import _chat_terminal as terminal

            read, writer = terminal.reader([*COMMANDS, *LEAVE]), terminal.writer
    options = generation_options(arguments)
    check_options(arguments.bundle, options)
    check_template(Path(arguments.bundle), arguments.system)
    notes = Console(stderr=True, highlight=False)
    with notes.status("loading the model"):
        model = load(arguments.bundle, arguments.device, arguments.threads)
    if is_terminal():
        name, context = Path(arguments.bundle).resolve().name, model.decoding.context
        notes.print(f"phimoe-onnx {phimoe_onnx.__version__}, {name}, a context of {context} tokens", markup=False)
        notes.print("/help lists the commands, Ctrl-D leaves.\n", style="dim")
    _talk(Chat(model, model.chat(arguments.system), options), read, writer, notes)


def _plain() -> Callable[[str], object]:
    """What shows the pieces of an answer to a pipe."""
    return put


def _talk(chat: Chat, read: Callable[[], str], writer: Callable[[], Callable[[str], object]], notes: Console) -> None:
    """Reads and answers until the end of the input or a command to leave; `writer` makes what shows an answer."""
    from phimoe_onnx.cli import _chat_commands as commands

    def note(text: RenderableType, style: str = "dim") -> None:
        notes.print(text, style=style, markup=False, soft_wrap=not notes.is_terminal)

    while True:
        try:
            text, is_command = parse(read())
        except EOFError:
            return
        if is_command and text.split()[0] in commands.LEAVE:
            return
        try:
            if is_command:
                note(commands.run(chat, text))
            elif text:
                note(_answer(chat, text, writer()))
        except PhiMoEError as error:
            note(f"error: {error}", "red")
            if not is_command and _is_full(chat, text):
                note("/reset makes room: it forgets the conversation. /save FILE keeps it first.")
        except KeyboardInterrupt:  # stops an answer
            note("[stopped]")
        if notes.is_terminal:
            notes.print()


def _answer(chat: Chat, message: str, write: Callable[[str], object]) -> str:
    """Prints the answer as it comes; returns what there is to say about it."""
    with contextlib.closing(chat.conversation.send(message, stream=True, **chat.options)) as pieces:
        result = stream(pieces, write)
    used, context = result.prompt_tokens + len(result.token_ids), chat.model.decoding.context
    note = f"[{len(result.token_ids)} tokens, {speed(result)}; {used} of {context} tokens of the context]"
    if used >= context:
        note += "\nThe context is full. /reset makes room: it forgets the conversation. /save FILE keeps it first."
    elif result.finish_reason == "length":
        note += "\nThe answer was cut off after max_new_tokens, which /set max_new_tokens N changes."
    return note


def _is_full(chat: Chat, message: str) -> bool:
    """Whether the conversation has no room for a message, which would fit alone."""
    said = chat.conversation.messages
    system = [each for each in said[:1] if each["role"] == "system"]
    context, new = chat.model.decoding.context, chat.options.get("max_new_tokens") or 1

    def fits(messages: list[Message]) -> bool:
        try:
            return len(chat.model.encode(messages, limit=context)) + new <= context
        except GenerationError:
            return False

    ask = {"role": "user", "content": message}
    return not fits([*said, ask]) and fits([*system, ask])


if __name__ == "__main__":
    sys.exit(main())
