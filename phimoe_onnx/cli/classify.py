"""phimoe-classify: the label of each text and its score."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import phimoe_onnx
from phimoe_onnx.cli._common import run
from phimoe_onnx.cli._streams import read_text


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "phimoe-classify", description="Print the label of each text, its score and the text, tabs between."
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that phimoe-export wrote from a classifier")
    add("texts", metavar="TEXT", nargs="*", help="the texts (default: the lines of standard input)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu (default) or cuda")
    add("--threads", type=int, metavar="N", help="threads for one operator (default: ONNX Runtime's choice)")
    return run(_classify, parser, argv)


def _classify(arguments: argparse.Namespace) -> None:
    model = phimoe_onnx.PhiMoE.load(arguments.bundle, arguments.device, arguments.threads)
    texts = arguments.texts or read_text().splitlines()
    for text, result in zip(texts, model.classify(texts), strict=True):
        print(result.label, f"{result.score:.4f}", text, sep="\t")


if __name__ == "__main__":
    sys.exit(main())
