"""Prints the perplexity of bundles on a text, window by window, as a Markdown table.

The change is how much larger it is than the first bundle's. Its standard error is that of the difference, window by
window: the text's own ups and downs are common to both. With --kl also how far a token's distribution is from the first
bundle's, in nats, its mean and the 99.9th percentile, and how often both think the same token most likely; the first
bundle's distributions are kept for that, in files beyond 2 GB.

python benchmarks/perplexity.py persuasion.txt build/austen-none build/austen-int8 build/austen-int4
python benchmarks/perplexity.py persuasion.txt build/austen-none build/austen-int4 --window 256 --windows 60 --kl
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from phimoe_onnx import PhiMoE
from phimoe_onnx.parity.comparison import log_softmax
from phimoe_onnx.scratch import Scratch

Array = NDArray[np.float32]


@dataclass
class Measured:
    """Of a bundle: the log-probability of each window and how many tokens that is of; with --kl each token's divergence
    and agreement.
    """

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    kl: list[Array] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)


def main() -> None:
    """Reads the text, scores it with each bundle and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", type=Path, help="UTF-8; line breaks inside a paragraph count as spaces")
    add("bundles", nargs="+", help="folders that phimoe-export wrote; the first is what others lose from")
    add("--tokens", type=int, metavar="N", help="of the text, from its beginning (default: all)")
    add("--window", type=int, metavar="N", help="tokens of a window (default: the context's length)")
    add("--windows", type=int, metavar="N", help="how many whole ones, spread over the text (default: all)")
    add("--kl", action="store_true", help="divergence and agreement, too")
    arguments = parser.parse_args()
    paragraphs = re.split(r"\n\s*\n", arguments.text.read_text(encoding="utf-8"))
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    more = " KL, mean | KL, 99.9 % | top-1 |" if arguments.kl else ""
    print(f"| bundle | target | weights | MB | tokens | perplexity | change |{more}\n|{'---|' * (10 if more else 7)}")
    first: Measured | None = None
    expected: list[Array] = []
    for bundle in arguments.bundles:
        model = PhiMoE.load(bundle)
        ids = model.tokenizer.encode(text)[: arguments.tokens]
        windows = cut(ids, arguments.window or model.decoding.context, arguments.windows)
        if arguments.kl and first is None:
            scratch = Scratch()
            expected = [scratch.empty(len(window), model.decoding.vocab_size) for window in windows]
        measured = measure(model, windows, expected, bundle, fill=first is None)
        first = first or measured
        lost = np.array(first.sums) - np.array(measured.sums)
        ratio, error = _ratio(lost, np.array(measured.counts))
        megabytes = sum(path.stat().st_size for path in Path(bundle).iterdir()) / 1e6
        perplexity = math.exp(-sum(measured.sums) / sum(measured.counts))
        figures = f"{megabytes:.1f} | {sum(measured.counts)} | {perplexity:.3f} | {ratio - 1:+.2%} ± {error:.2%} |"
        if arguments.kl:
            kl, same = np.concatenate(measured.kl), np.concatenate(measured.same)
            figures += f" {kl.mean():.4f} | {np.quantile(kl, 0.999):.3f} | {same.mean():.1%} |"
        print(f"| {Path(bundle).name} | {model.manifest.target} | {model.manifest.quantize} | {figures}")


def cut(ids: list[int], size: int, number: int | None) -> list[list[int]]:
    """Windows that do not overlap: all, the last maybe a shorter one, or so many whole ones."""
    windows = [ids[start : start + size] for start in range(0, len(ids) - 1, size)]
    if number is None:
        return windows
    whole = [window for window in windows if len(window) == size]
    return [whole[index] for index in np.linspace(0, len(whole) - 1, number).astype(int)]


def measure(
    model: PhiMoE, windows: Sequence[list[int]], expected: Sequence[Array], name: str, *, fill: bool
) -> Measured:
    """Runs a bundle; `expected` are the first one's log-probabilities [S, V] of each window, kept now with `fill`, or
    nothing where none are asked for.
    """
    measured = Measured()
    for n, window in enumerate(track(windows, description=name, console=Console(stderr=True), transient=True)):
        if not expected:
            logprobs = model.score(window).logprobs
        else:
            log_q = log_softmax(model.logits(window))
            if fill:
                expected[n][:] = log_q
            logprobs = log_q[np.arange(len(window) - 1), window[1:]]
            measured.kl.append((np.exp(expected[n]) * (expected[n] - log_q)).sum(-1)[:-1])
            measured.same.append(expected[n].argmax(-1)[:-1] == log_q.argmax(-1)[:-1])
        measured.sums.append(float(logprobs.sum(dtype="f8")))
        measured.counts.append(len(logprobs))
    return measured


def _ratio(lost: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """The quotient of two perplexities and its standard error, from the log-probability that each window lost."""
    mean = lost.sum() / counts.sum()
    spread = lost - mean * counts  # of a ratio of sums: Cochran, Sampling Techniques, section 6.4
    windows = len(counts)
    error = math.sqrt(windows / max(windows - 1, 1) * (spread**2).sum()) / counts.sum()
    return math.exp(mean), math.exp(mean) * error


if __name__ == "__main__":
    main()
