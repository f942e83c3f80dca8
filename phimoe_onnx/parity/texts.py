"""The texts that classifiers and embeddings are compared on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import PhiMoEError

LENGTHS = (8, 16, 32, 64, 128)  # tokens


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
