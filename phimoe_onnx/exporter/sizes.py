"""How many bytes and bits a recipe's parameters take, and sizes as people write them."""

from __future__ import annotations

import math
import re

from phimoe_onnx.checkpoint.tensors import shapes
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.recipe import EMBEDDING, HEAD, Recipe

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def stored_bytes(config: PhiMoEConfig, recipe: Recipe, name: str) -> int:
    """Bytes of a parameter."""
    known = shapes(config, recipe.task)
    forms = recipe.forms[name]
    *outer, k = known.get(name, known[EMBEDDING] if name == HEAD else ())
    return sum(sum(form.nbytes(math.prod(outer) // len(forms), k)) for form in forms)


def weight_bytes(config: PhiMoEConfig, recipe: Recipe) -> int:
    """Bytes of all parameters."""
    return sum(stored_bytes(config, recipe, name) for name in recipe.forms)


def count_weights(config: PhiMoEConfig, recipe: Recipe) -> int:
    """Numbers of all parameters; a tied head is stored by itself, and counts."""
    known = shapes(config, recipe.task)
    return sum(math.prod(known.get(name, known[EMBEDDING])) for name in recipe.forms)


def average_bits(config: PhiMoEConfig, recipe: Recipe) -> float:
    """Bits of all that is stored of the parameters, with scales, over their number: embeddings, head, norms, biases and
    routers count as well.
    """
    return 8 * weight_bytes(config, recipe) / count_weights(config, recipe)


def parse_size(text: str) -> int:
    """Bytes of "14GB", "800 MB": decimal units.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(kB|MB|GB|TB)", text)
    if match is None:
        raise ValueError(f"{text!r} is no size; expected a number with one of {', '.join(UNITS)}, such as 14GB")
    return int(float(match[1]) * UNITS[match[2]])


def shown(nbytes: int) -> str:
    """A size for people, rounded up."""
    unit, factor = next(
        (unit, factor) for unit, factor in reversed(UNITS.items()) if nbytes >= factor or factor == 1000
    )
    return f"{-(-nbytes * 100 // factor) / 100:g} {unit}"
