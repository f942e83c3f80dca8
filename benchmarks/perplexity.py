"""Prints the perplexity of bundles on a text, in windows of the context's length.

The last column is how much larger it is than the first bundle's. Its standard error is that of the difference, window
by window: the text's own ups and downs are common to both.

python benchmarks/perplexity.py persuasion.txt build/austen-none build/austen-int8 build/austen-int4
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from phimoe_onnx import PhiMoE


def main() -> None:
    """Reads the text, scores it with each bundle and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="UTF-8; line breaks inside a paragraph count as spaces")
    parser.add_argument("bundles", nargs="+", help="folders that phimoe-export wrote")
    parser.add_argument("--tokens", type=int, help="of the text, from its beginning (default: all)")
    arguments = parser.parse_args()
    paragraphs = re.split(r"\n\s*\n", arguments.text.read_text(encoding="utf-8"))
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    print("| bundle | target | weights | MB | tokens | perplexity | to the first |\n|---|---|---|---|---|---|---|")
    first = None
    for bundle in arguments.bundles:
        model = PhiMoE.load(bundle)
        token_ids = model.tokenizer.encode(text)[: arguments.tokens]
        size = model.decoding.context
        windows = [token_ids[start : start + size] for start in range(0, len(token_ids) - 1, size)]
        scores = [
            model.score(window)
            for window in track(windows, description=bundle, console=Console(stderr=True), transient=True)
            if len(window) > 1
        ]
        counts = np.array([len(score.logprobs) for score in scores])
        sums = np.array([score.logprobs.sum(dtype="f8") for score in scores])
        count, perplexity = int(counts.sum()), math.exp(-sums.sum() / counts.sum())
        if first is None:
            first = sums
        ratio, error = _ratio(first - sums, counts)
        megabytes = sum(path.stat().st_size for path in Path(bundle).iterdir()) / 1e6
        manifest = model.manifest
        name = Path(bundle).name
        figures = f"{megabytes:.1f} | {count} | {perplexity:.3f} | {ratio - 1:+.2%} ± {error:.2%}"
        print(f"| {name} | {manifest.target} | {manifest.quantize} | {figures} |")


def _ratio(lost: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """The quotient of two perplexities and its standard error, from the log-probability that each window lost."""
    mean = lost.sum() / counts.sum()
    spread = lost - mean * counts  # of a ratio of sums: Cochran, Sampling Techniques, section 6.4
    windows = len(counts)
    error = math.sqrt(windows / max(windows - 1, 1) * (spread**2).sum()) / counts.sum()
    return math.exp(mean), math.exp(mean) * error


if __name__ == "__main__":
    main()
