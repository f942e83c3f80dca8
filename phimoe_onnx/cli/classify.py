"""phimoe-classify: the label of each text and its score."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import phimoe_onnx
from phimoe_onnx.cli._common import Parser, add_device_options, run
from phimoe_onnx.cli._start import imports
from phimoe_onnx.cli._streams import read_lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        "phimoe-classify",
        "Print the label of each text, its score and the text, tabs between, a line a text. An empty text has a label "
        "only if the tokenizer makes a token of it, such as one that begins every text.",
        'classifier "It was a delight." "Three volumes too long."',
        "classifier < reviews.txt > labels.tsv",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote from a classifier")
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        help="the texts (default: the lines of standard input, each as it is, blank ones too)",
    )
    add_device_options(parser)
    return run(_classify, parser, argv)


def _classify(arguments: argparse.Namespace) -> None:
    with imports():
        load = phimoe_onnx.PhiMoE.load
    model = load(arguments.bundle, arguments.device, arguments.threads)
    texts = arguments.texts or read_lines()
    nothing = model.tokenizer.encode("")  # the tokens of an empty text, often none
    prompts = {number: text or nothing for number, text in enumerate(texts) if text or nothing}
    results = dict(zip(prompts, model.classify(list(prompts.values())), strict=True))
    for number, text in enumerate(texts):
        if result := results.get(number):
            print(result.label, f"{result.score:.4f}", text, sep="\t")
        else:
            print("\t\t")
            print(f"note: text {number + 1} is empty, and this tokenizer makes no token of it", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
