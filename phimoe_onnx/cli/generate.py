"""phimoe-generate: continues a prompt, or answers it as a chat message, and streams the text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import phimoe_onnx
from phimoe_onnx.cli._common import Parser, add_generation_options, check_options, generation_options, run, show
from phimoe_onnx.cli._start import imports
from phimoe_onnx.cli._streams import read_text


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        "phimoe-generate",
        "Continue a prompt with a PhiMoE bundle. The text goes to standard output, its speed to standard error.",
        'austen-int4 "It was a fine morning, and"',
        'austen-int4 "Who is Emma?" --chat --temperature 0.8 --seed 1',
        "austen-int4 - --max-new-tokens 60 < prompt.txt",
    )
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
    with imports():
        load = phimoe_onnx.PhiMoE.load
    text = read_text() if arguments.prompt == "-" else arguments.prompt
    options = generation_options(arguments)
    check_options(arguments.bundle, options)
    model = load(arguments.bundle, arguments.device, arguments.threads)
    if arguments.chat or arguments.system is not None:
        show(model.chat(arguments.system).send(text, stream=True, **options))
    else:
        show(model.generate(text, stream=True, **options))


if __name__ == "__main__":
    sys.exit(main())
