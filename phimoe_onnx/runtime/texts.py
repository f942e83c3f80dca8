"""Whole texts in one pass each, without a cache: which of them run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS

BATCH_TOKENS = 4096  # that run at once, padding included: enough to fill the matrix products, and bounds their memory


def run_texts(session: InferenceSession, output: str, texts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Runs all texts, batch by batch; yields the numbers of a batch's texts and the graph's `output` for them, [rows, ...]."""
    for batch in batches([len(text) for text in texts]):
        longest = len(texts[batch[-1]])
        tokens = np.zeros((len(batch), longest), np.int64)
        mask = np.zeros_like(tokens)
        for row, number in enumerate(batch):
            tokens[row, : len(texts[number])] = texts[number]
            mask[row, : len(texts[number])] = 1
        (result,) = session.run([output], {INPUT_IDS: tokens, ATTENTION_MASK: mask})
        yield batch, result


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of the texts that run together, from the shortest to the longest.

    A batch has at most BATCH_TOKENS tokens with its padding, and no text is padded to more than twice its length; a text of
    more than BATCH_TOKENS runs alone.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[number]
        if batch and ((len(batch) + 1) * length > BATCH_TOKENS or length > 2 * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
