"""Prints what a bundle's rounding costs: bundles against the first one, window by window over a text that none of them
was made for, as a Markdown table.

python -m benchmarks.roundings persuasion.txt build/none build/rtn build/calibrated [--windows 180]

Perplexity's change comes with its paired standard error: each window's loss is held against the first bundle's on the
same window. KL is the divergence of a token's distribution from the first bundle's, its mean and the 99.9th percentile;
top-1 is how often both think the same token most likely.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from phimoe_onnx import PhiMoE
from phimoe_onnx.scratch import Scratch

Array = NDArray[np.float32]


@dataclass
class Measured:
    """Of a bundle: the mean loss of each window, and each token's divergence and agreement."""

    losses: list[float] = field(default_factory=list)
    kl: list[Array] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)


def main() -> None:
    """Reads the text, runs each bundle over its windows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8; line breaks inside a paragraph count as spaces")
    parser.add_argument(
        "bundles", nargs="+", help="folders that phimoe-export wrote; the first is what others lose from"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of a window (default: up to the rope boundary)")
    parser.add_argument("--windows", type=int, metavar="N", help="how many, spread over the text (default: all)")
    arguments = parser.parse_args()
    first = PhiMoE.load(arguments.bundles[0])
    size = arguments.tokens or first.decoding.rope_boundary or first.decoding.context
    windows = cut(first, arguments.text, size, arguments.windows)
    scratch = Scratch()
    expected = [scratch.empty(size, first.decoding.vocab_size) for _ in windows]
    print(f"{len(windows)} windows of {size} tokens")
    print("| bundle | MB | perplexity | change | KL, mean | KL, 99.9 % | top-1 |\n|---|---|---|---|---|---|---|")
    base: list[float] = []
    for bundle in arguments.bundles:
        measured = measure(PhiMoE.load(bundle), windows, expected, bundle, fill=not base)
        base = base or measured.losses
        off = np.array(measured.losses) - np.array(base)
        change, error = math.expm1(off.mean()), off.std(ddof=1) / math.sqrt(len(off))
        kl, same = np.concatenate(measured.kl), np.concatenate(measured.same)
        megabytes = sum(path.stat().st_size for path in Path(bundle).iterdir()) / 1e6
        figures = f"{change:+.2%} ± {error:.2%} | {kl.mean():.4f} | {np.quantile(kl, 0.999):.3f} | {same.mean():.1%}"
        print(f"| {Path(bundle).name} | {megabytes:.1f} | {math.exp(np.mean(measured.losses)):.3f} | {figures} |")


def cut(model: PhiMoE, text: Path, size: int, number: int | None) -> list[list[int]]:
    """Windows of `size` tokens that do not overlap."""
    paragraphs = re.split(r"\n\s*\n", text.read_text(encoding="utf-8"))
    joined = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    ids = model.tokenizer.encode(joined)
    starts = range(0, len(ids) - size + 1, size)
    chosen = range(len(starts)) if number is None else np.linspace(0, len(starts) - 1, number).astype(int)
    return [ids[starts[index] : starts[index] + size] for index in chosen]


def measure(model: PhiMoE, windows: list[list[int]], expected: list[Array], name: str, fill: bool) -> Measured:
    """Runs a bundle; `fill` keeps its log-probabilities as what the others are held against."""
    measured = Measured()
    places = list(zip(windows, expected, strict=True))
    for window, reference in track(places, description=name, console=Console(stderr=True), transient=True):
        logits = np.concatenate(list(model.decoder(1, len(window)).logits(window)))
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        if fill:
            reference[:] = logprobs
        following = np.array(window[1:])
        measured.losses.append(-float(logprobs[np.arange(len(following)), following].mean(dtype="f8")))
        measured.kl.append((np.exp(reference) * (reference - logprobs)).sum(-1)[:-1])
        measured.same.append(reference.argmax(-1)[:-1] == logprobs.argmax(-1)[:-1])
    return measured


if __name__ == "__main__":
    main()
