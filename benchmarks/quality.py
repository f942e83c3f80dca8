"""Prints quality against bits a weight: our bundles through the kernels that ship, and other tools' quantisers.

    python -m benchmarks.quality --text persuasion.txt --text another.txt --json quality.json --html quality.html
    python -m benchmarks.quality --text persuasion.txt --windows 40 --only int4

Each text must be one that the model was not trained on. It is cut into windows of --length tokens, each run as if
alone; --windows takes that many, spread evenly over the text. Every candidate meets the same windows, so that its
perplexity is compared pair by pair with that of PyTorch over the checkpoint in float32.

Our bundles are exported here and run on ONNX Runtime's CPU kernels, which round activations to int8. A peer's weights
are rounded by the peer's own code, read back as float32 and run in PyTorch, whose activations are float32: that favours
the peer. A peer that is not installed is named with the reason. --json keeps results: what is there is not run again,
if texts, windows and length are the same, so peers may be added from another environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks import quality_page, quality_peers
from phimoe_onnx import PhiMoE, export, reference
from phimoe_onnx.checkpoint.tensors import parameters, read_headers, shapes
from phimoe_onnx.cli._output import check_file, write_file
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.exporter.kinds import kind
from phimoe_onnx.exporter.quantize.strips import STRIP, Strips
from phimoe_onnx.exporter.recipe import bits_per_weight
from phimoe_onnx.exporter.sizes import weight_bytes
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.exporter.widths import PASSAGE, Widths
from phimoe_onnx.layered import checkpoint_weights
from phimoe_onnx.parity.bits import ROUNDED, mean_bits, stored_bits, together
from phimoe_onnx.parity.comparison import log_softmax
from phimoe_onnx.parity.stored import stored_as
from phimoe_onnx.scratch import Scratch

MODEL = Path("models/phimoe-austen")
JSON_MARK, HTML_MARK = '{\n  "written_by": "quality"', "<!doctype html>\n<!-- quality -->"
Z = 1.96  # standard errors of a bound of 95 %

# Our candidates: a name, and the options of phimoe_onnx.export. What the exporter refuses is named with its words.
# `within` is no option of its: widths are chosen as --bits chooses them, for no more bits than that preset of llama.cpp
# has, in both weightings.
NATIVE: dict[str, Any] = {"operators": "native"}
FINE = {"*self_attn*": "int8", "lm_head.*": "int8"}
OURS: dict[str, dict[str, Any]] = {
    "int8": {"quantize": "int8", "operators": "stock"},
    "int8, native": {"quantize": "int8", **NATIVE},
    "int4 rtn": {"quantize": "int4", "rounding": "rtn"},
    "int4 two-level": {"quantize": "int4", "operators": "stock"},
    "int4 rtn, attention and head int8": {"quantize": "int4", "rounding": "rtn", "store": FINE},
    **{
        f"{name}{', calibrated' if calibrate else ''}, native": {**options, **NATIVE, "calibrate": calibrate}
        for name, options in {
            "int4": {"quantize": "int4"},
            "int4, attention and head int8": {"quantize": "int4", "store": FINE},
            "int3": {"quantize": "int3"},
            "int2": {"quantize": "int2"},
            **{f"widths for {rival}'s bits": {"within": rival} for rival in ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS")},
        }.items()
        for calibrate in (False, True)
    },
}

# The shape by which kinds of weights are counted a second time: Phi-3.5-MoE's.
PHI35 = {
    **{"hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "vocab_size": 32064},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16, "max_position_embeddings": 131072},
}

# The logits [S, V] of a window of tokens.
Logits = Callable[[list[int]], NDArray[np.float32]]
# The bits a weight of each matrix, in this model and in one of large rows, and the logits.
Candidate = tuple[dict[str, float], dict[str, float], Logits]


@dataclass
class Quality:
    """What one candidate is on one text, compared with the reference; `change` and `bound` are shares, KL is in nats.

    Attributes:
        tokens: how many next tokens count.
        perplexity: the candidate's; `change` is by how much more than the reference's it is, give or take `bound`
            (95 %, of the windows' paired differences).
        kl: the mean; `kl_median` and `kl_q999` are quantiles over the tokens.
        top1: the share of tokens whose best next token is the reference's.
    """

    tokens: int
    perplexity: float
    change: float
    bound: float
    kl: float
    kl_median: float
    kl_q999: float
    top1: float


@dataclass
class Result:
    """A candidate: bits a weight, scales counted in, of experts, attention and head, weighted as in this model and as
    in Phi-3.5-MoE; and its quality by text. `bits` is None of a candidate that did not run, for the `reason`.
    """

    name: str
    source: str
    bits: float | None = None
    bits_phi35: float | None = None
    texts: dict[str, Quality] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


def main() -> None:
    """Runs the candidates and prints a Markdown table of each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=MODEL, help=f"default: {MODEL}")
    add("--text", type=Path, action="append", required=True, metavar="FILE", help="held-out UTF-8 text; repeatable")
    add("--windows", type=int, metavar="N", help="of each text, spread evenly over it (default: all)")
    add("--length", type=int, default=256, metavar="N", help="tokens of a window (default: 256)")
    add("--calibration", type=Path, metavar="FILE", help="text for peers that take one (default: those are left out)")
    add("--calibration-tokens", type=int, default=24576, metavar="N", help="how much of it (default: 24576)")
    add("--ggml", type=Path, metavar="FILE", help="libggml-base.so (default: that of an installed llama-cpp-python)")
    add("--only", action="append", metavar="WORDS", help="candidates whose source and name have these; repeatable")
    add("--json", metavar="FILE", help="keep results there, and go on with those that are in it")
    add("--html", metavar="FILE", help="draw them")
    add("--overwrite", action="store_true", help="write the files over others")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except PhiMoEError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Measures what is not measured yet, and writes and prints everything."""
    for file, mark in ((arguments.json, JSON_MARK), (arguments.html, HTML_MARK)):
        if file:
            check_file(file, mark, arguments.overwrite)
    checkpoint = arguments.checkpoint
    config = read_config(checkpoint)
    tokenizer = reference_tokenizer(checkpoint)
    texts = {file.name: windows(tokenizer(file), arguments.length, arguments.windows) for file in arguments.text}
    settings = {
        "checkpoint": checkpoint.name,
        "length": arguments.length,
        "windows": {name: len(each) for name, each in texts.items()},
        "sha256": hashlib.sha256(json.dumps(list(texts.values())).encode()).hexdigest(),
    }
    results = earlier(arguments.json, settings)
    model = reference.load_reference(checkpoint)
    base = {name: Base.of(each, lambda ids: reference.logits(model, ids)) for name, each in texts.items()}
    calibration = []
    if arguments.calibration:
        calibration = spread(tokenizer(arguments.calibration), arguments.length, arguments.calibration_tokens)
    setting = quality_peers.Setting(checkpoint, config, calibration, arguments.length, arguments.ggml)
    for source, name, prepare in candidates(setting):
        wanted = arguments.only is None or any(words in f"{source} {name}" for words in arguments.only)
        if not wanted or any((each.source, each.name) == (source, name) and each.texts for each in results):
            continue
        result = measured(source, name, prepare, config, base)
        results = [each for each in results if (each.source, each.name) != (source, name)] + [result]
        if arguments.json:
            values = {"written_by": "quality", **settings, "reference": {n: b.perplexity for n, b in base.items()}}
            values["results"] = [dataclasses.asdict(each) for each in results]
            write_file(arguments.json, json.dumps(values, indent=2) + "\n", JSON_MARK, arguments.overwrite)
    for name, each in base.items():
        print(f"\n{name}: {len(each.windows)} windows of {arguments.length} tokens; float32: {each.perplexity:.3f}\n")
        print("\n".join(markdown(results, name)))
    if missing := [each for each in results if not each.texts]:
        print("\nNot run:\n" + "\n".join(f"- {each.source} {each.name}: {each.reason}" for each in missing))
    if arguments.html:
        page = quality_page.page(HTML_MARK, settings, results)
        write_file(arguments.html, page, HTML_MARK, arguments.overwrite)


def reference_tokenizer(checkpoint: Path) -> Callable[[Path], list[int]]:
    """What reads a file as token ids; line breaks inside a paragraph count as spaces, as in perplexity.py."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def read(file: Path) -> list[int]:
        paragraphs = re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))
        text = "\n\n".join(" ".join(each.split()) for each in paragraphs if each.strip())
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return read


def windows(ids: list[int], length: int, count: int | None) -> list[list[int]]:
    """All windows of that length, or so many of them, spread evenly; what is left at the end is dropped."""
    found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not found:
        raise PhiMoEError(f"a text has {len(ids)} tokens, a window {length}: give a longer text or --length")
    if count is None or count >= len(found):
        return found
    return [found[round((n + 0.5) * len(found) / count - 0.5)] for n in range(count)]


def spread(ids: list[int], length: int, tokens: int) -> list[int]:
    """So many tokens of a text: windows of all its parts in an order by chance, so that the first say of all, too."""
    parts = windows(ids, length, max(1, tokens // length))
    random.Random(0).shuffle(parts)
    return [token for part in parts for token in part]


def candidates(
    setting: quality_peers.Setting,
) -> Iterator[tuple[str, str, Callable[[], Candidate]]]:
    """A source, a name, and what gives bits a weight of each matrix and the logits of a window."""
    for name, options in OURS.items():
        yield "phimoe-onnx", name, lambda options=options: ours(setting, options)
    for source, name, round_all in quality_peers.peers(setting):
        yield source, name, lambda round_all=round_all: peer(setting, round_all)


def ours(setting: quality_peers.Setting, options: dict[str, Any]) -> Candidate:
    """A bundle, exported to a temporary folder that lasts as long as the logits are asked for."""
    options, folder = dict(options), tempfile.TemporaryDirectory()
    if rival := options.pop("within", None):
        options |= {"quantize": "int8", "store": chosen(setting, rival)}
    bundle = export(setting.checkpoint, Path(folder.name) / "bundle", **options)
    model = PhiMoE.load(bundle)

    def logits(ids: list[int], kept: Any = folder) -> NDArray[np.float32]:
        return model.logits(ids)

    config, forms = setting.config, stored_as(model.manifest)
    large = stored_bits(model.manifest, config)
    own = {
        name: strip_bits(config, name, form.dtype) if (form := forms.get(name)) and form.layout == "strips" else bits
        for name, bits in large.items()
    }
    return own, large, logits


def strip_bits(config: PhiMoEConfig, name: str, dtype: str) -> float:
    """What a matrix takes in the native operators' strips. Rows count as if they were joined to multiples of 256, like
    those that llama.cpp rounds.
    """
    k = math.lcm(shapes(config, "text-generation")[name][-1], quality_peers.SUPERBLOCK)
    return 8 * Strips(int(dtype.removeprefix("int"))).strip_bytes(k) / (STRIP * k)


def chosen(setting: quality_peers.Setting, rival: str) -> dict[str, str]:
    """The form of each matrix: the least cost at no more bits than a preset of llama.cpp has, in both weightings."""
    config, widths = setting.config, measured_widths(setting.checkpoint)
    limits = both_means(quality_peers.preset_bits(config, rival), config)

    def within(nbytes: int) -> dict[str, str]:
        forms = widths.within(nbytes).forms
        return {name: forms[name][0].dtype for item in widths.items for place in item for name in place.parameters()}

    def fits(nbytes: int) -> bool:
        forms = within(nbytes)
        own = {name: strip_bits(config, name, dtype) for name, dtype in forms.items()}
        large = {name: bits_per_weight(Strips(int(dtype[3:]))) for name, dtype in forms.items()}
        means = both_means(own, config)[0], both_means(large, config)[1]
        return all(ours <= theirs for ours, theirs in zip(means, limits, strict=True))

    low, high = (weight_bytes(config, recipe) for recipe in (widths.smallest(), widths.largest()))
    if not fits(low):
        raise PhiMoEError(f"{rival} has {limits[0]:.2f} and {limits[1]:.2f} bits; int2 throughout has more")
    while high - low > 1000:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return within(low)


@cache
def measured_widths(checkpoint: Path) -> Widths:
    """What each width of each place costs, as `--bits` measures it."""
    config = read_config(checkpoint)
    widths = Widths(config, TARGETS["cpu"], NATIVE)
    read = checkpoint_weights(config, parameters(config, read_headers(checkpoint)))
    widths.measure(read, PASSAGE.read_text(encoding="utf-8"), checkpoint, lambda *_: None)
    return widths


def peer(setting: quality_peers.Setting, round_all: quality_peers.RoundAll) -> Candidate:
    """PyTorch over the weights that a peer rounded."""
    model = reference.load_reference(setting.checkpoint)
    bits = {}
    with torch.no_grad():
        matrices = {name: each for name, each in model.named_parameters() if kind(name) in ROUNDED and each.ndim > 1}
        shown = track(matrices.items(), description="rounding", console=Console(stderr=True), transient=True)
        for name, matrix in shown:
            bits[name] = round_all(name, matrix)
    return bits, bits, lambda ids: reference.logits(model, ids)


def both_means(bits: dict[str, float], config: PhiMoEConfig) -> tuple[float, float]:
    """The mean bits a weight, weighted as in this model and as in Phi-3.5-MoE."""
    by_kind = mean_bits(bits, config)
    return together(by_kind, config), together(by_kind, phi35(config))


def measured(
    source: str,
    name: str,
    prepare: Callable[[], Candidate],
    config: PhiMoEConfig,
    base: dict[str, Base],
) -> Result:
    """The candidate's figures, or why there are none."""
    start, result = time.monotonic(), Result(name, source)
    print(f"{source} {name} ...", file=sys.stderr)
    try:
        own, large, logits = prepare()
        result.bits, result.bits_phi35 = both_means(own, config)[0], both_means(large, config)[1]
        for text, each in base.items():
            result.texts[text] = each.quality(logits, f"{source} {name}, {text}")
    except (PhiMoEError, ImportError, OSError, ValueError, RuntimeError, AssertionError) as error:
        result.reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"  not run: {result.reason}", file=sys.stderr)
    result.seconds = time.monotonic() - start
    return result


def phi35(config: PhiMoEConfig) -> PhiMoEConfig:
    """A configuration with Phi-3.5-MoE's shape, for counting."""
    names = {each.name for each in dataclasses.fields(PhiMoEConfig)}
    return dataclasses.replace(config, head_dim=128, **{k: v for k, v in PHI35.items() if k in names})


@dataclass
class Base:
    """The reference on the windows of a text: its log-probabilities [windows, S, V], and its surprise by window."""

    windows: list[list[int]]
    log_p: NDArray[np.float32]
    loss: NDArray[np.float64]

    @classmethod
    def of(cls, windows: list[list[int]], logits: Logits) -> Base:
        """Runs the reference."""
        first = log_softmax(logits(windows[0]))
        log_p = Scratch().empty(len(windows), *first.shape)
        for n, ids in enumerate(track(windows, description="reference", console=Console(stderr=True), transient=True)):
            log_p[n] = log_softmax(logits(ids))
        return cls(windows, log_p, np.array([surprise(p, ids) for p, ids in zip(log_p, windows, strict=True)]))

    @property
    def perplexity(self) -> float:
        """Of all next tokens."""
        return math.exp(self.loss.mean())

    def quality(self, logits: Logits, what: str) -> Quality:
        """A candidate beside the reference, window by window."""
        losses, divergences, same = [], [], []
        shown = track(self.windows, description=what, console=Console(stderr=True), transient=True)
        for ids, log_p in zip(shown, self.log_p, strict=True):
            log_q = log_softmax(np.asarray(logits(ids), np.float32))
            losses.append(surprise(log_q, ids))
            divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[:-1])
            same.append((log_p.argmax(axis=-1) == log_q.argmax(axis=-1))[:-1])
        change, bound = paired(np.array(losses), self.loss)
        kl = np.concatenate(divergences).astype(np.float64)
        return Quality(
            tokens=len(kl),
            perplexity=math.exp(np.mean(losses)),
            change=change,
            bound=bound,
            kl=float(kl.mean()),
            kl_median=float(np.median(kl)),
            kl_q999=float(np.quantile(kl, 0.999)),
            top1=float(np.concatenate(same).mean()),
        )


def surprise(log_p: NDArray[np.float32], ids: list[int]) -> float:
    """The mean negative log-probability of a window's tokens but the first."""
    return -float(np.take_along_axis(log_p[:-1], np.array(ids[1:])[:, None], axis=-1).mean(dtype=np.float64))


def paired(losses: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float]:
    """By which share the perplexity is larger, and the half width of its 95 % interval: of the mean paired difference
    of windows of equal length, by its standard error. The bound of a single window is NaN.
    """
    difference = losses - base
    change = math.expm1(difference.mean())
    if len(difference) < 2:
        return change, math.nan
    return change, Z * float(difference.std(ddof=1)) / math.sqrt(len(difference)) * (1 + change)


def earlier(file: str | None, settings: dict[str, Any]) -> list[Result]:
    """The results of a file with the same settings; of another or of none an empty list."""
    if not file or not Path(file).exists() or not Path(file).stat().st_size:
        return []
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    found = {name: values.get(name) for name in settings}
    if found != settings:
        raise PhiMoEError(f"{file}: is of {found}, this run is of {settings}; name another file")
    return [
        Result(**{**each, "texts": {name: Quality(**quality) for name, quality in each["texts"].items()}})
        for each in values["results"]
    ]


def markdown(results: list[Result], text: str) -> Iterator[str]:
    """The table of one text, the most bits first; * marks the Pareto front by KL."""
    rows = sorted((each for each in results if text in each.texts), key=lambda each: -(each.bits or 0))
    front = quality_page.pareto([(each.bits or 0, each.texts[text].kl) for each in rows])
    yield "| candidate | bits | bits, Phi-3.5 | perplexity | KL mean | median | 99.9 % | same top-1 |"
    yield "|---|---|---|---|---|---|---|---|"
    for n, each in enumerate(rows):
        q, mark = each.texts[text], " *" if n in front else ""
        yield (
            f"| {each.source} {each.name}{mark} | {each.bits:.2f} | {each.bits_phi35:.2f} | "
            f"{100 * q.change:+.2f} ± {100 * q.bound:.2f} % | {q.kl:.4f} | {q.kl_median:.4f} | {q.kl_q999:.3f} | "
            f"{q.top1:.2%} |"
        )


if __name__ == "__main__":
    main()
