"""verify(): a bundle's logits and text against the PyTorch reference, on real text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx import reference as pytorch
from phimoe_onnx.bundle import Manifest, check_files, read_manifest
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import GenerationError, PhiMoEError
from phimoe_onnx.modeling import PhiMoEForCausalLM
from phimoe_onnx.parity.comparison import Comparison, log_softmax
from phimoe_onnx.parity.stored import stored_cache, stored_model
from phimoe_onnx.parity.texts import compare_texts, cut_texts
from phimoe_onnx.runtime.generate import generate
from phimoe_onnx.runtime.model import PhiMoE

SAMPLE = Path(__file__).with_name("persuasion.txt")  # Jane Austen, Persuasion, chapters 1 and 2


@dataclass(frozen=True)
class Thresholds:
    """The most that is allowed; None is not checked.

    Attributes:
        mean_difference: of the outputs from the reference's, absolute, on average, in standard deviations of the
            latter.
        max_difference: the same at worst.
        kernel_difference: as mean_difference, from PyTorch over the weights that the bundle stores.
        kl: mean divergence from the reference, nats a token (of a classifier, a text).
        kernel_kl: mean divergence from PyTorch over the weights that the bundle stores, nats a token.
        perplexity_ratio: the bundle's perplexity over the reference's.
    """

    mean_difference: float | None = None
    max_difference: float | None = None
    kernel_difference: float | None = None
    kl: float | None = None
    kernel_kl: float | None = None
    perplexity_ratio: float | None = None


# float32 differs from PyTorch by the order of sums alone, so the worst logit is held too. The others are about twice
# what the small model shows (README.md): rounding, of weights or of activations, moves a token's choice of experts now
# and then, and then its logits far, so they are held by means. fp16 rounds nothing in a bf16 checkpoint but weights
# below 6e-5.
DEFAULTS = {
    "none": Thresholds(mean_difference=1e-4, max_difference=1e-3),
    "fp16": Thresholds(kl=1e-3, kernel_kl=1e-6, perplexity_ratio=1.001),
    "int8": Thresholds(kl=1e-2, kernel_kl=1e-2, perplexity_ratio=1.005),
    "int4": Thresholds(kl=1e-1, kernel_kl=1e-2, perplexity_ratio=1.05),
}

# For outputs that are no distribution: hidden states, and logits of labels that do not exclude each other. About twice
# what the small model shows as a feature extractor, and as a classifier with a random head.
VALUES = {
    "none": DEFAULTS["none"],
    "fp16": Thresholds(mean_difference=1e-3, kernel_difference=1e-4),
    "int8": Thresholds(mean_difference=5e-2, kernel_difference=4e-2),
    "int4": Thresholds(mean_difference=3e-1, kernel_difference=4e-2),
}

# What a cache of integers may add to the divergence and to the perplexity's ratio, by its dtype: again about twice what
# the small model shows. One rounding the other way moves single tokens by more than float32's order of sums does.
CACHE_KL = {"int8": 1e-2, "uint8": 2e-1}
CACHE_PERPLEXITY = {"int8": 5e-3, "uint8": 5e-2}
CACHE_KERNEL_KL = {"int8": 1e-3, "uint8": 3e-2}


def default_thresholds(manifest: Manifest) -> Thresholds:
    """Those of the bundle's task and weights, widened for a cache of integers."""
    form = manifest.quantize
    if form == "none" and manifest.dtype != "float32":  # activations of float16, which are no exact kernel to hold
        form = "fp16"
    if manifest.task != "text-generation":
        softmax = manifest.classes is not None and manifest.classes.function_to_apply == "softmax"
        return dataclasses.replace(DEFAULTS[form], perplexity_ratio=None) if softmax else VALUES[form]
    limits, cache = DEFAULTS[form], manifest.decoding.cache.dtype
    if cache not in CACHE_KL:
        return limits
    return Thresholds(
        kl=(limits.kl or 0.0) + CACHE_KL[cache],
        kernel_kl=(limits.kernel_kl or 0.0) + CACHE_KERNEL_KL[cache],
        perplexity_ratio=(limits.perplexity_ratio or 1.0) + CACHE_PERPLEXITY[cache],
    )


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        tokens: how many tokens were run, in windows of `windows` tokens.
        bundle_to_reference: what a user of the bundle sees.
        bundle_to_stored: the kernels alone, against PyTorch over the stored weights and cache; None where those are the
            reference's.
        stored_to_reference: the rounding of weights and cache alone, with the reference's choice of experts replayed.
        routing_agreement: the share of tokens and layers whose two experts stay the same with the stored weights.
        perplexity: of "reference", "stored" and "bundle"; of text-generation, like `greedy`.
        greedy: "prompt", "reference" and "bundle" as text, and "agreeing", the number of equal tokens at the start.
        failures: the thresholds that were passed, in words; empty means success.
    """

    bundle: str
    reference: str
    task: str
    quantize: str
    target: str
    tokens: int
    windows: list[int]
    thresholds: Thresholds
    bundle_to_reference: Comparison
    bundle_to_stored: Comparison | None
    stored_to_reference: Comparison | None
    routing_agreement: float | None
    perplexity: dict[str, float]
    greedy: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def verify(
    bundle: str | Path,
    reference: str | Path,
    *,
    text: str | None = None,
    tokens: int = 4096,
    new_tokens: int = 64,
    device: str = "cpu",
    thresholds: Thresholds | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compares a bundle with the checkpoint that it came from.

    Args:
        bundle: its folder.
        reference: the checkpoint's folder.
        text: what to run; two chapters of Persuasion if not given.
        tokens: how many tokens of it at the most.
        new_tokens: length of the greedy continuations.
        device: where the bundle runs; the reference always runs in PyTorch on the CPU in float32.
        thresholds: the most that is allowed; by default those of the bundle's precision.
        progress: called with the windows done and the windows to do.

    Raises:
        PhiMoEError: as for loading either, the text is too short, or a threshold is given for what the task does not
            have.
    """
    folder, checkpoint = Path(bundle), Path(reference)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hash_everything=True)
    exact = pytorch.load_reference(checkpoint, manifest.task)
    runtime = PhiMoE.load(folder, device=device)
    if read_config(folder) != exact.config:
        raise PhiMoEError(
            f"{bundle}: its config.json is not that of {reference}, so it is not this checkpoint's bundle"
        )
    rounded = manifest.quantize != "none" or manifest.decoding.cache.dtype in CACHE_KL
    limits = thresholds or default_thresholds(manifest)

    token_ids = runtime.tokenizer.encode(text if text is not None else SAMPLE.read_text(encoding="utf-8"))[:tokens]
    windows = list((cut if manifest.task == "text-generation" else cut_texts)(token_ids, exact.config))
    report = Report(
        bundle=str(bundle),
        reference=str(reference),
        task=manifest.task,
        quantize=manifest.quantize,
        target=manifest.target,
        tokens=sum(len(window) for window in windows),
        windows=[len(window) for window in windows],
        thresholds=limits,
        bundle_to_reference=Comparison(),
        bundle_to_stored=Comparison() if rounded else None,
        stored_to_reference=Comparison() if rounded else None,
        routing_agreement=None,
        perplexity={},
    )
    if isinstance(exact, PhiMoEForCausalLM):
        stored = stored_model(exact, folder, manifest) if rounded else None
        _compare_tokens(report, runtime, exact, stored, partial(stored_cache, folder, manifest), windows, progress)
        report.greedy = _greedy(runtime, exact, windows[0], new_tokens)
    else:
        compare_texts(
            report, runtime, exact, stored_model(exact, folder, manifest) if rounded else None, windows, progress
        )
    report.failures = list(_failures(report, limits))
    return report


def _compare_tokens(
    report: Report,
    runtime: PhiMoE,
    exact: PhiMoEForCausalLM,
    stored: PhiMoEForCausalLM | None,
    cache: Callable[[], AbstractContextManager[None]],
    windows: Sequence[list[int]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills in the comparisons of a report on text generation; `cache` makes PyTorch round keys and values as the
    bundle does.
    """
    nll: dict[str, list[NDArray[np.float32]]] = {}
    same_routing: list[float] = []
    for done, window in enumerate(windows):
        if progress:
            progress(done, len(windows))
        with pytorch.recorded_routing() as routing:
            expected = pytorch.logits(exact, window)
        got = runtime.logits(window)
        outputs = {"reference": expected, "bundle": got}
        report.bundle_to_reference.add(got, expected)
        if stored and report.bundle_to_stored and report.stored_to_reference:
            with pytorch.recorded_routing() as stored_routing, cache():
                outputs["stored"] = pytorch.logits(stored, window)
            with pytorch.replayed_routing(routing), cache():
                report.stored_to_reference.add(pytorch.logits(stored, window), expected)
            report.bundle_to_stored.add(got, outputs["stored"])
            same_routing.append(pytorch.agreement(routing, stored_routing))
        for name, output in outputs.items():
            nll.setdefault(name, []).append(
                -np.take_along_axis(log_softmax(output[:-1]), np.array(window[1:])[:, None], axis=-1)
            )
    report.perplexity = {
        name: float(np.exp(np.concatenate(values).mean(dtype=np.float64))) for name, values in nll.items()
    }
    if same_routing:
        report.routing_agreement = float(np.average(same_routing, weights=report.windows))


def cut(token_ids: Sequence[int], config: PhiMoEConfig) -> Iterator[list[int]]:
    """Windows of a text: up to 256 tokens for its first half, then one up to the context's end, past rope boundary and
    window.

    Raises:
        PhiMoEError: the text has fewer than two tokens.
    """
    if len(token_ids) < 2:
        raise PhiMoEError(f"the text has {len(token_ids)} tokens, at least 2 are needed to compare anything")
    short = min(256, config.max_position_embeddings)
    half = len(token_ids) // 2 if len(token_ids) > short else len(token_ids)
    for start in range(0, half - 1, short):
        yield list(token_ids[start : min(start + short, half)])
    if rest := list(token_ids[half : half + config.max_position_embeddings]):
        yield rest


def _greedy(runtime: PhiMoE, exact: Any, window: list[int], new_tokens: int) -> dict[str, Any]:
    prompt = window[: min(32, len(window))]
    new = min(new_tokens, runtime.decoding.context - len(prompt))
    expected = pytorch.greedy(exact, prompt, new)
    got: list[int] = []
    with suppress(GenerationError):  # logits that are not finite fail the comparison as it is
        request = dataclasses.replace(runtime.request(prompt, max_new_tokens=new), eos=frozenset())  # none ends it
        got.extend(piece.token_id for piece in generate(runtime.engine, [request]))
    agreeing = next(
        (n for n, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
    )
    decode = runtime.tokenizer.decode
    return {
        "prompt": decode(prompt),
        "reference": decode(expected),
        "bundle": decode(got),
        "agreeing": agreeing,
        "new_tokens": new,
    }


def _failures(report: Report, limits: Thresholds) -> Iterator[str]:
    measured = {
        "mean_difference": report.bundle_to_reference.mean_difference,
        "max_difference": report.bundle_to_reference.max_difference,
        "kernel_difference": report.bundle_to_stored.mean_difference if report.bundle_to_stored else 0.0,
        "kl": report.bundle_to_reference.kl,
        "kernel_kl": report.bundle_to_stored.kl if report.bundle_to_stored else 0.0,
        "perplexity_ratio": report.perplexity["bundle"] / report.perplexity["reference"] if report.perplexity else None,
    }
    for name, value in measured.items():
        limit = getattr(limits, name)
        if limit is not None and value is None:
            raise PhiMoEError(f"there is no {name} to check of a bundle for {report.task}")
        if limit is not None and not value <= limit:  # not a NaN either
            yield f"{name} is {value:.3g}, allowed is {limit:.3g}"
