"""What goes on inside a model while it reads a text: which experts each token takes, and the hidden states.

The graph is opened once more, on the CPU, with the values that are looked at as outputs. This takes the memory of its
weights again, and ONNX Runtime may fuse less of a graph whose values are read, so that a number may differ from those
of `generate` and `score` in its last bits. Dimensions: T tokens, E experts, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from phimoe_onnx.bundle import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS_TO_KEEP,
    ROPE_LENGTH,
    Manifest,
    cache_names,
    check_files,
)
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.ort.errors import run_errors
from phimoe_onnx.runtime.ort.session import open_tapped
from phimoe_onnx.runtime.ort.taps import Taps

Arrays = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Routing:
    """The two experts of each token in each layer.

    Attributes:
        token_ids: the text's tokens, T of them.
        num_experts: E.
        experts: int64 [layers, T, 2], the first choice and the second.
        weights: float32 [layers, T, 2]: what each expert's output is multiplied by, in (0, 1]. The two are chosen one
            after the other and do not sum to 1.
        margins: float32 [layers, T, 2], how far SparseMixer's mask is from letting a rival in. A rival of score s is as
            far from the chosen score m as (m - s) / max(|s|, m), and is dropped beyond 2 eps, where eps is the
            config's router_jitter_noise. The margin is that distance of the nearest rival, less 2 eps: above 0 no rival
            counts and the weight is 1; -2 eps is a rival level with the choice; inf is where there is no rival.

    """

    token_ids: list[int]
    num_experts: int
    experts: NDArray[np.int64]
    weights: NDArray[np.float32]
    margins: NDArray[np.float32]


class Probe:
    """A bundle's graph whose inside can be read; `Probe.open` makes one."""

    def __init__(self, session: InferenceSession, taps: Taps, manifest: Manifest, jitter: float) -> None:
        self.jitter = jitter  # eps of SparseMixer
        self._session, self._taps = session, taps
        self._task, self._decoding = manifest.task, manifest.decoding

    @classmethod
    def open(cls, bundle: Path, manifest: Manifest, threads: int | None = None) -> Probe:
        """Opens the graph that `PhiMoE.load` would take on the CPU.

        Raises:
            BundleError: a file is missing or changed, or the graph has not the nodes that the exporter makes today.
            ConfigError: the bundle's config.json is damaged.
            DeviceError: no graph runs on the CPU here.
            OutOfMemoryError: there is too little memory.
        """
        check_files(bundle, manifest)
        jitter = read_config(bundle).router_jitter_noise
        session, taps = open_tapped(bundle, manifest, threads)
        return cls(session, taps, manifest, jitter)

    def routing(self, ids: Sequence[int], step: Callable[[int], None] = lambda tokens: None) -> Routing:
        """The routing of a text of 1 to `context` tokens; `step` is called with how many were just read.

        Raises:
            GenerationError: a score is not finite, so the graph computed nonsense.
            OutOfMemoryError: there is too little memory.
        """
        chunks = []
        for values in self._run(ids, self._taps.scores):
            scores = np.stack(values)
            if not np.isfinite(scores).all():
                raise GenerationError("the router's scores are not finite; check the bundle with phimoe-verify")
            chunks.append(sparse_mixer(scores, self.jitter))
            step(scores.shape[1])
        experts, weights, margins = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
        return Routing(list(ids), scores.shape[-1], experts, weights, margins)

    def hidden_states(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Float32 [layers + 1, T, H], as `PhiMoE.hidden_states` gives them; errors are as for `routing`."""
        return np.concatenate([np.stack(chunk) for chunk in self._run(ids, self._taps.hidden)], axis=1)

    def _run(self, ids: Sequence[int], names: list[str]) -> Iterator[Arrays]:
        """The values of those names, float32 [T', ...] each, of one chunk of the text after the other."""
        whole = self._task != "text-generation"
        chunk = len(ids) if whole else self._decoding.prefill_chunk
        layers = 0 if whole else self._decoding.cache.num_hidden_layers
        cache: list[NDArray[Any]] = []
        for start in range(0, len(ids), chunk):
            tokens = np.array([ids[start : start + chunk]], np.int64)
            end = start + tokens.size
            feeds: dict[str, NDArray[Any]] = {INPUT_IDS: tokens, ATTENTION_MASK: np.ones((1, end), np.int64)}
            if not whole:
                feeds |= {LOGITS_TO_KEEP: np.array([1]), ROPE_LENGTH: np.array([len(ids)])}
                feeds |= zip(cache_names(layers, "past_key_values"), cache or self._nothing(), strict=True)
            needed = end * self._decoding.cache.bytes_per_token
            with run_errors(f"{tokens.size} of a text's {len(ids)} tokens", needed):
                values = self._session.run([*names, *cache_names(layers, "present")], feeds)
            cache = values[len(names) :]
            yield [value.reshape(tokens.size, -1).astype(np.float32, copy=False) for value in values[: len(names)]]

    def _nothing(self) -> list[NDArray[Any]]:
        cache = self._decoding.cache
        empty = np.zeros((1, cache.num_key_value_heads, 0, cache.head_dim), np.dtype(cache.dtype))
        return [empty] * (2 * cache.num_hidden_layers)


def sparse_mixer(
    scores: NDArray[np.float32], jitter: float
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """SparseMixer's routing at inference, GRIN-MoE (arXiv 2409.12136), in float32 as the graphs compute it.

    Args:
        scores: the router's, [..., E].
        jitter: eps, the config's router_jitter_noise.

    Returns:
        experts, weights and margins [..., 2] as in `Routing`.

    """
    experts = np.argsort(-scores, axis=-1, kind="stable")[..., :2]  # of equal scores the lower index first
    best = np.take_along_axis(scores, experts, axis=-1)[..., None]
    rivals = scores[..., None, :]  # [..., 1, E] against [..., 2, 1]: both rounds at once
    gap = rivals - best
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(gap == 0, np.float32(0), -gap / np.maximum(np.abs(rivals), best))
    width = np.float32(jitter) * np.float32(2)
    chosen = np.arange(scores.shape[-1]) == experts[..., None]
    taken = np.zeros_like(chosen)
    taken[..., 1, :] = chosen[..., 0, :]  # the second round cannot choose the first expert again
    weights = 1 / np.where((distance > width) | taken, np.float32(0), np.exp(gap)).sum(axis=-1)
    margins = np.where(taken | chosen, np.float32(np.inf), distance).min(axis=-1) - width
    return experts, weights, margins
