"""Whole texts in one pass each, without a cache, and which of them run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS
from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.ort.errors import run_errors

BATCH_TOKENS = 4096  # that run at once, padding included: enough to fill the matrix products, and bounds their memory


def run_texts(session: InferenceSession, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """What the graph says of each text's last token: a classifier's logits [n, labels], or hidden states [n,
    hidden_size].

    Raises:
        GenerationError: a number is not finite, so the graph computed nonsense.

    """
    (output,) = session.get_outputs()
    results = np.empty((len(texts), output.shape[-1]), np.float32)
    for batch in batches([len(text) for text in texts]):
        lengths = np.array([len(texts[number]) for number in batch])
        mask = (np.arange(lengths[-1]) < lengths[:, None]).astype(np.int64)
        tokens = np.zeros_like(mask)
        tokens[mask > 0] = np.concatenate([texts[number] for number in batch])
        with run_errors(f"{len(batch)} texts of up to {lengths[-1]} tokens", tokens.size * output.shape[-1] * 4):
            (values,) = session.run([output.name], {INPUT_IDS: tokens, ATTENTION_MASK: mask})
        results[batch] = values if values.ndim == 2 else values[np.arange(len(batch)), lengths - 1]
    if not np.isfinite(results).all():
        raise GenerationError(f"the graph's {output.name} are not finite; check the bundle with phimoe-verify")
    return results


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of the texts that run together, from the shortest to the longest.

    A batch has at most BATCH_TOKENS tokens with its padding, and no text is padded to more than twice its length; a
    text of more than BATCH_TOKENS runs alone.
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
