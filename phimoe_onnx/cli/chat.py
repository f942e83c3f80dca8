"""phimoe-chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import phimoe_onnx
from phimoe_onnx.cli._common import add_generation_options, generation_options, run, show
from phimoe_onnx.errors import GenerationError


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "phimoe-chat",
        description="Talk to a PhiMoE bundle. /reset forgets the conversation, /quit or the end of input leaves, "
        "Ctrl-C stops an answer.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote")
    add_generation_options(parser)
    return run(_chat, parser, argv)


def _chat(arguments: argparse.Namespace) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing and history
    conversation = phimoe_onnx.PhiMoE.load(arguments.bundle, arguments.device, arguments.threads).chat(arguments.system)
    options = generation_options(arguments)
    if sys.stdin is None:
        raise GenerationError("standard input is closed; a chat needs it")
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            print()
            return
        if message == "/quit":
            return
        if message == "/reset":
            conversation.reset()
        elif message:
            try:
                with contextlib.closing(conversation.send(message, stream=True, **options)) as pieces:
                    show(pieces)
            except GenerationError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print()


if __name__ == "__main__":
    sys.exit(main())
