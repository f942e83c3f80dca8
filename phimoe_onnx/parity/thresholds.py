"""What a bundle may differ by: the defaults follow from the facts of its manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from phimoe_onnx.bundle import Manifest


class Measure(NamedTuple):
    """A number that a threshold is for: its unit, and what it is."""

    unit: str
    meaning: str


MEASURES = {
    "mean_difference": Measure("std", "mean |difference| of the outputs from the reference's"),
    "max_difference": Measure("std", "the largest |difference| of an output from the reference's"),
    "kernel_difference": Measure("std", "as mean_difference, from PyTorch over the weights that the bundle stores"),
    "kl": Measure("nats", "mean KL divergence from the reference"),
    "kernel_kl": Measure("nats", "as kl, from PyTorch over the weights that the bundle stores"),
    "perplexity_ratio": Measure("ratio", "the bundle's perplexity over the reference's"),
}
UNITS = (
    "std, a standard deviation of the reference's outputs; nats, of a token, or of a text if the bundle labels texts."
)


@dataclass(frozen=True)
class Thresholds:
    """The most that is allowed of each of MEASURES, in its unit; None is not checked."""

    mean_difference: float | None = None
    max_difference: float | None = None
    kernel_difference: float | None = None
    kl: float | None = None
    kernel_kl: float | None = None
    perplexity_ratio: float | None = None


# By the bits of the narrowest matrix. float32 differs from PyTorch by the order of sums alone, so the worst logit is
# held too. The others are about twice what the small model shows (README.md): rounding, of weights or of activations,
# moves a token's choice of experts now and then, and then its logits far, so they are held by means. 16 bits round
# nothing in a bf16 checkpoint but weights below 6e-5.
DEFAULTS = {
    32: Thresholds(mean_difference=1e-4, max_difference=1e-3),
    16: Thresholds(kl=1e-3, kernel_kl=1e-6, perplexity_ratio=1.001),
    8: Thresholds(kl=1e-2, kernel_kl=1e-2, perplexity_ratio=1.005),
    4: Thresholds(kl=1e-1, kernel_kl=1e-2, perplexity_ratio=1.05),
    3: Thresholds(kl=2.5e-1, kernel_kl=1e-2, perplexity_ratio=1.1),
    2: Thresholds(kl=1.0, kernel_kl=1.5e-2, perplexity_ratio=1.7),
}

# For outputs that are no distribution: hidden states, and logits of labels that do not exclude each other. About twice
# what the small model shows as a feature extractor, and as a classifier with a random head.
VALUES = {
    32: DEFAULTS[32],
    16: Thresholds(mean_difference=1e-3, kernel_difference=1e-4),
    8: Thresholds(mean_difference=5e-2, kernel_difference=4e-2),
    4: Thresholds(mean_difference=3e-1, kernel_difference=4e-2),
    3: Thresholds(mean_difference=4e-1, kernel_difference=7e-2),
    2: Thresholds(mean_difference=8e-1, kernel_difference=7e-2),
}

# What a cache of integers may add to the divergence and to the perplexity's ratio, by its dtype: again about twice what
# the small model shows. One rounding the other way moves single tokens by more than float32's order of sums does.
CACHE_KL = {"int8": 1e-2, "uint8": 2e-1}
CACHE_PERPLEXITY = {"int8": 5e-3, "uint8": 5e-2}
CACHE_KERNEL_KL = {"int8": 1e-3, "uint8": 3e-2}


def shown_defaults(name: str) -> str:
    """A measure's defaults for text generation, by the narrowest weights."""
    limits = {bits: limit for bits in DEFAULTS if (limit := getattr(DEFAULTS[bits], name)) is not None}
    if not limits:
        return "not checked"
    return ", ".join(f"{limit:g} for {'int' if bits < 16 else 'float'}{bits}" for bits, limit in limits.items())


def fewest_bits(manifest: Manifest) -> int:
    """Of a stored matrix, or of the activations where these have fewer."""
    dtypes = {group.dtype for group in manifest.weights} | {manifest.dtype}
    return min(int(dtype.lstrip("bfloatin")) for dtype in dtypes)


def default_thresholds(manifest: Manifest) -> Thresholds:
    """Those of the bundle's task and weights, widened for a cache of integers."""
    bits = max(known for known in DEFAULTS if known <= fewest_bits(manifest))
    if manifest.task != "text-generation":
        softmax = manifest.classes is not None and manifest.classes.function_to_apply == "softmax"
        return dataclasses.replace(DEFAULTS[bits], perplexity_ratio=None) if softmax else VALUES[bits]
    limits, cache = DEFAULTS[bits], manifest.decoding.cache.dtype
    if cache not in CACHE_KL:
        return limits
    return Thresholds(
        kl=(limits.kl or 0.0) + CACHE_KL[cache],
        kernel_kl=(limits.kernel_kl or 0.0) + CACHE_KERNEL_KL[cache],
        perplexity_ratio=(limits.perplexity_ratio or 1.0) + CACHE_PERPLEXITY[cache],
    )
