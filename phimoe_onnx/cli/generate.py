"""phimoe-generate: continues a prompt, or answers it as a chat message, and streams the text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import phimoe_onnx
from phimoe_onnx.cli._common import add_generation_options, generation_options, run, show
from phimoe_onnx.cli._streams import read_text


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("phimoe-generate", description="Continue a prompt with a PhiMoE bundle.")
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        help="the text to continue; - reads it from standard input, without a byte-order mark and the last line's end",
    )
    parser.add_argument("--chat", action="store_true", help="give the prompt as a user's message (also with --system)")
    add_generation_options(parser)
    return run(_generate, parser, argv)


def _generate(arguments: argparse.Namespace) -> None:
    text = read_text() if arguments.prompt == "-" else arguments.prompt
    model = phimoe_onnx.PhiMoE.load(arguments.bundle, arguments.device, arguments.threads)
    options = generation_options(arguments)
    if arguments.chat or arguments.system is not None:
        show(model.chat(arguments.system).send(text, stream=True, **options))
    else:
        show(model.generate(text, stream=True, **options))


if __name__ == "__main__":
    sys.exit(main())
