"""How many bits a weight of a bundle takes, scales and zero points counted in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from phimoe_onnx.bundle import Manifest, StoredWeights
from phimoe_onnx.checkpoint.tensors import shapes
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.kinds import kind
from phimoe_onnx.exporter.quantize.format import Format, Plain
from phimoe_onnx.exporter.quantize.strips import Strips
from phimoe_onnx.exporter.recipe import bits_per_weight, is_matrix
from phimoe_onnx.parity.stored import stored_as

ROUNDED = ("experts", "attention", "lm_head")  # the kinds that every quantiser rounds; embeddings are looked up


def stored_bits(manifest: Manifest, config: PhiMoEConfig) -> dict[str, float]:
    """The bits a weight of each matrix that may be rounded, by its name in modeling.py; of a stack of experts a mean.

    Raises:
        BundleError: as for `stored_as`.
    """
    forms = stored_as(manifest)
    found = {}
    for name in matrices(config, manifest.task):
        experts = [forms[key] for n in range(config.num_local_experts) if (key := f"{name}.{n}") in forms]
        groups = [forms[name]] if name in forms else experts
        if groups:
            found[name] = sum(map(_bits, groups)) / len(groups)
    return found


def matrices(config: PhiMoEConfig, task: str = "text-generation") -> dict[str, int]:
    """How many weights each matrix that may be rounded has, by its name in modeling.py."""
    return {name: math.prod(shape) for name, shape in shapes(config, task).items() if is_matrix(name, shape)}


def mean_bits(bits: Mapping[str, float], config: PhiMoEConfig, of: Callable[[str], str] = kind) -> dict[str, float]:
    """The mean bits a weight of each kind that `of` makes of a name."""
    sizes = matrices(config)
    weights: dict[str, int] = {}
    total: dict[str, float] = {}
    for name, each in bits.items():
        weights[of(name)] = weights.get(of(name), 0) + sizes[name]
        total[of(name)] = total.get(of(name), 0.0) + sizes[name] * each
    return {name: total[name] / weights[name] for name in total}


def together(by_kind: Mapping[str, float], config: PhiMoEConfig) -> float:
    """The mean bits a weight of `ROUNDED`, each kind with as many weights as a model of that configuration has."""
    weights = dict.fromkeys(ROUNDED, 0)
    for name, count in matrices(config).items():
        if kind(name) in weights:
            weights[kind(name)] += count
    known = {name: count for name, count in weights.items() if name in by_kind}
    return sum(by_kind[name] * count for name, count in known.items()) / sum(known.values())


def _bits(stored: StoredWeights) -> float:
    if stored.block_size is None:
        return bits_per_weight(Plain(stored.dtype))
    bits = int(stored.dtype.removeprefix("int"))
    if stored.layout == "strips":
        return bits_per_weight(Strips(bits))
    scale = stored.scale_dtype or "float32"
    return bits_per_weight(Format(bits, stored.block_size, scale, stored.symmetric))
