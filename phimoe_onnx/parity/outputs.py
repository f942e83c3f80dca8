"""What a bundle says: its outputs over texts, and how it continues one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.bundle import Manifest
from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.generate import generate
from phimoe_onnx.runtime.model import PhiMoE

PROMPT = 32  # tokens


def bundle_outputs(
    runtime: PhiMoE, texts: Sequence[list[int]], empty: Callable[[int, int], NDArray[np.float32]]
) -> Iterator[NDArray[np.float32]]:
    """Of text-generation the logits [S, V] of each text, one after the other; of the other tasks the logits [n, labels]
    or hidden states [n, hidden_size] of all texts at once. `empty` makes the arrays of logits.
    """
    if runtime.manifest.task == "feature-extraction":
        yield runtime.embed(list(texts))
    elif runtime.manifest.task == "text-classification":
        yield np.array([result.logits for result in runtime.classify(list(texts))], np.float32)
    else:
        for text in texts:
            logits, start = empty(len(text), runtime.decoding.vocab_size), 0
            for piece in runtime.decoder(1, len(text)).logits(text):
                logits[start : start + len(piece)] = piece
                start += len(piece)
            yield logits


def is_distribution(manifest: Manifest) -> bool:
    """Whether the outputs are the logits of one distribution."""
    if manifest.task == "text-generation":
        return True
    return manifest.classes is not None and manifest.classes.function_to_apply == "softmax"


def continuation(runtime: PhiMoE, prompt: Sequence[int], new: int) -> list[int]:
    """The `new` most likely tokens one by one; fewer where logits are not finite, which fails any comparison."""
    tokens: list[int] = []
    with suppress(GenerationError):
        request = dataclasses.replace(runtime.request(prompt, max_new_tokens=new), eos=frozenset())  # none ends it
        tokens.extend(piece.token_id for piece in generate(runtime.engine, [request]))
    return tokens


def greedy(
    decode: Callable[[list[int]], str], prompt: list[int], expected: list[int], got: list[int], new: int
) -> dict[str, Any]:
    """The report's section on greedy continuations: what the reference and the bundle say after `prompt`.

    `expected` is the reference's as far as it is known: to the first token at which it parts from a bundle's.
    """
    pairs = enumerate(zip(expected, got, strict=False))
    agreeing = next((n for n, (a, b) in pairs if a != b), min(len(expected), len(got)))
    return {
        "prompt": decode(prompt),
        "reference": decode(expected),
        "bundle": decode(got),
        "agreeing": agreeing,
        "new_tokens": new,
    }
