"""Prints the perplexity of bundles on a whole text, in windows of the context's length.

python benchmarks/perplexity.py persuasion.txt build/austen-none build/austen-int8 build/austen-int4
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from rich.console import Console
from rich.progress import track

from phimoe_onnx import PhiMoE


def main() -> None:
    """Reads the text, scores it with each bundle and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="UTF-8; line breaks inside a paragraph count as spaces")
    parser.add_argument("bundles", nargs="+", help="folders that phimoe-export wrote")
    arguments = parser.parse_args()
    paragraphs = re.split(r"\n\s*\n", arguments.text.read_text(encoding="utf-8"))
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    print("| bundle | target | weights | MB | tokens | perplexity | to the first |\n|---|---|---|---|---|---|---|")
    first = None
    for bundle in arguments.bundles:
        model = PhiMoE.load(bundle)
        token_ids = model.tokenizer.encode(text)
        size = model.decoding.context
        windows = [token_ids[start : start + size] for start in range(0, len(token_ids) - 1, size)]
        scores = [
            model.score(window)
            for window in track(windows, description=bundle, console=Console(stderr=True), transient=True)
            if len(window) > 1
        ]
        count = sum(len(score.logprobs) for score in scores)
        perplexity = math.exp(-sum(float(score.logprobs.sum(dtype="f8")) for score in scores) / count)
        first = first or perplexity
        megabytes = sum(path.stat().st_size for path in Path(bundle).iterdir()) / 1e6
        manifest = model.manifest
        name = Path(bundle).name
        figures = f"{megabytes:.1f} | {count} | {perplexity:.3f} | {perplexity / first - 1:+.2%}"
        print(f"| {name} | {manifest.target} | {manifest.quantize} | {figures} |")


if __name__ == "__main__":
    main()
