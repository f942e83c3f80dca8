"""Bundles that answer once a text, classifiers and embeddings, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx import reference as pytorch
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.parity.report import Report
from phimoe_onnx.runtime.model import PhiMoE

LENGTHS = (8, 16, 32, 64, 128)  # tokens


def compare_texts(
    report: Report,
    runtime: PhiMoE,
    exact: pytorch.TextModel,
    stored: pytorch.TextModel | None,
    texts: Sequence[list[int]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills in the comparisons of a report: PyTorch runs each text alone, the bundle all of them as one batch."""
    expected, rounded, replayed, same_routing = [], [], [], []
    for done, text in enumerate(texts):
        if progress:
            progress(done, len(texts))
        recording, routing = pytorch.recorded(exact)
        expected.append(pytorch.last(recording, text))
        if stored:
            recording, stored_routing = pytorch.recorded(stored)
            rounded.append(pytorch.last(recording, text))
            replayed.append(pytorch.last(pytorch.replayed(stored, routing), text))
            same_routing.append(pytorch.agreement(routing, stored_routing))
    got = _run(runtime, texts)
    distribution = runtime.manifest.classes is not None and runtime.manifest.classes.function_to_apply == "softmax"
    report.bundle_to_reference.add(got, np.stack(expected), distribution=distribution)
    if report.bundle_to_stored and report.stored_to_reference:
        report.bundle_to_stored.add(got, np.stack(rounded), distribution=distribution)
        report.stored_to_reference.add(np.stack(replayed), np.stack(expected), distribution=distribution)
        report.routing_agreement = float(np.average(same_routing, weights=report.windows))


def cut_texts(token_ids: Sequence[int], config: PhiMoEConfig) -> Iterator[list[int]]:
    """Texts of `LENGTHS` in turns for the first half, then one up to the context's end, past rope boundary and window.

    Raises:
        PhiMoEError: there are too few tokens for two texts.
    """
    half = len(token_ids) // 2
    if not half:
        raise PhiMoEError(f"the text has {len(token_ids)} tokens, at least 2 are needed to compare anything")
    start = 0
    for length in cycle(LENGTHS):
        if start >= half:
            break
        yield list(token_ids[start : min(start + min(length, config.max_position_embeddings), half)])
        start += length
    yield list(token_ids[half : half + config.max_position_embeddings])


def _run(runtime: PhiMoE, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    """Logits [n, labels] or hidden states [n, hidden_size]."""
    if runtime.manifest.task == "feature-extraction":
        return runtime.embed(list(texts))
    return np.array([result.logits for result in runtime.classify(list(texts))], np.float32)
