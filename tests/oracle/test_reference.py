"""modeling.py and the float32 bundles made from it against transformers: 4.57 for everything but head_dim, 5 for
head_dim.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from phimoe_onnx import PhiMoE, parity, reference
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.pipeline import export
from tests.checkpoints import MODEL, SHAPES, longrope, write_checkpoint

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

FOUR = transformers.__version__.startswith("4.")
HEAD_DIM: dict[str, dict[str, Any]] = {
    "head_dim": {"head_dim": 32},
    "head_dim-window": {"head_dim": 32, "sliding_window": 9},
    "head_dim-longrope": {"head_dim": 32, "rope_scaling": longrope(32)},
}
CASES = SHAPES.keys() - HEAD_DIM.keys() if FOUR else HEAD_DIM.keys()
TEXT = Path(parity.__file__).with_name("persuasion.txt")
NEW = 256


@dataclass(frozen=True)
class Subject:
    """What is held against the oracle: the logits after every token, and `NEW` greedy tokens."""

    logits: Callable[[list[int]], NDArray[np.float32]]
    greedy: Callable[[list[int]], list[int]]


@pytest.fixture(scope="module", params=[*sorted(CASES), *(["phimoe-austen"] if FOUR else [])])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without end tokens, so that everyone generates as many tokens as are asked for."""
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    if request.param in SHAPES | HEAD_DIM:
        return write_checkpoint(
            folder, eos_token_id=None, max_position_embeddings=512, **(SHAPES | HEAD_DIM)[request.param]
        )
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("generation_config.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return folder


@pytest.fixture(scope="module", params=["modeling", "cpu", "portable"])
def subject(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if request.param == "modeling":
        model = reference.load_reference(checkpoint)
        return Subject(partial(reference.logits, model), partial(reference.greedy, model, new=NEW))
    bundle = PhiMoE.load(
        export(checkpoint, tmp_path_factory.mktemp("bundle") / "bundle", target=request.param), threads=1
    )
    return Subject(bundle.logits, lambda ids: bundle.generate(ids, max_new_tokens=NEW).token_ids)


# a place is a length as a part of the longrope boundary
@pytest.mark.parametrize("place", [0.04, 0.25, 1, 1.04, 3])
def test_logits(checkpoint: Path, subject: Subject, place: float) -> None:
    ids = text(checkpoint, place)
    expected = expected_logits(checkpoint, ids)
    assert_close(subject.logits(ids)[: len(expected)], expected)


# across the boundary, across it with the first new token, and beyond it
@pytest.mark.parametrize("place", [0.25, 1, 3])
def test_greedy(checkpoint: Path, subject: Subject, place: float) -> None:
    ids = text(checkpoint, place)
    assert subject.greedy(ids) == expected_greedy(checkpoint, tuple(ids))


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("place", [1, 1.5])
def test_chunks(checkpoint: Path, place: float, chunk: int) -> None:
    model, ids = reference.load_reference(checkpoint), text(checkpoint, place)
    kv, parts, length = model.empty_cache(), [], torch.tensor([len(ids)])
    with torch.inference_mode():
        for start in range(0, len(ids), chunk):
            new = torch.tensor([ids[start : start + chunk]])
            part, kv = model(new, torch.ones(1, start + new.shape[1], dtype=torch.int64), length, kv)
            parts.append(part[0])
    expected = expected_logits(checkpoint, ids)
    assert_close(torch.cat(parts)[: len(expected)].numpy(), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("places", [(0.25, 1, 0.6), (1.5, 2, 1.1), (0.6, 1.5)])
def test_padded_batch(checkpoint: Path, places: tuple[float, ...], side: str) -> None:
    rows = [text(checkpoint, place) for place in places]
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
    mask = torch.tensor(
        [
            [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
            for r, p in zip(rows, pads, strict=True)
        ]
    )
    model = reference.load_reference(checkpoint)
    with torch.inference_mode():
        # transformers chooses the rope factors by the longest row, for all of them
        actual, _ = model(ids, mask, torch.tensor([longest]), model.empty_cache(len(rows)))
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        expected = oracle(checkpoint, longest)(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(actual[mask > 0].numpy(), expected[mask > 0].numpy())


SAVE_OPTIONS: list[dict[str, Any]] = (
    [{}, {"max_shard_size": "300KB"}] if FOUR else [{}, {"max_shard_size": "300KB"}, {"save_original_format": False}]
)


@pytest.mark.parametrize("options", SAVE_OPTIONS, ids=str)
def test_reads_what_transformers_saves(checkpoint: Path, options: dict[str, Any], tmp_path: Path) -> None:
    oracle(checkpoint, 1).save_pretrained(tmp_path, **options)
    assert read_config(tmp_path) == read_config(checkpoint)
    expected, actual = (
        reference.load_reference(checkpoint).state_dict(),
        reference.load_reference(tmp_path).state_dict(),
    )
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_reads_the_config_that_transformers_saves(tmp_path: Path) -> None:
    transformers.AutoConfig.from_pretrained(MODEL).save_pretrained(tmp_path)
    assert read_config(tmp_path) == read_config(MODEL)


@pytest.mark.skipif(FOUR, reason="transformers 4 has no fused experts")
def test_fused_experts(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "fused", writer="fused")
    ids = text(checkpoint, 1)
    expected = expected_logits(checkpoint, ids)
    assert_close(reference.logits(reference.load_reference(checkpoint), ids)[: len(expected)], expected)


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Ten times closer than what must hold."""
    difference = np.abs(actual - expected) / expected.std()
    assert difference.mean() <= 1e-5
    assert difference.max() <= 1e-4


def text(checkpoint: Path, place: float) -> list[int]:
    """The first tokens of the held-out text."""
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT.read_text(), add_special_tokens=False).ids
    return ids[: int(place * boundary(checkpoint))]


def boundary(checkpoint: Path) -> int:
    longrope = read_config(checkpoint).longrope
    return longrope.original_max_position_embeddings if longrope else 32


@cache
def oracle(checkpoint: Path, length: int, attention: str = "eager", model: str = "PhimoeForCausalLM") -> Any:
    """transformers' model of a checkpoint, right for sequences of `length` tokens."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if not FOUR and read_config(checkpoint).longrope and length > boundary(checkpoint):
        # transformers 5.23.0 keeps the short factors beyond the boundary (it calls rope_init_fn without seq_len), so
        # give it the long ones
        config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    kind = getattr(transformers, model)
    return kind.from_pretrained(checkpoint, config=config, dtype=torch.float32, attn_implementation=attention).eval()


def expected_logits(checkpoint: Path, ids: list[int]) -> NDArray[np.float32]:
    """The logits after every token, up to the first one whose experts or their weights are a matter of rounding."""
    with torch.inference_mode():
        output = oracle(checkpoint, len(ids))(torch.tensor([ids]), output_router_logits=True)
    jitter = read_config(checkpoint).router_jitter_noise
    decided = min(first_undecided(scores, jitter) for scores in output.router_logits)
    assert decided >= 0.8 * len(ids)
    logits: NDArray[np.float32] = output.logits[0, :decided].numpy()
    return logits


def first_undecided(scores: torch.Tensor, jitter: float) -> int:
    """The first token with two of its three best experts, or a rival and the 2 * jitter at which it counts, closer than
    1e-6.
    """
    top = scores.topk(3).values
    best = top[:, :2, None]
    gap = (best - scores[:, None]) / torch.maximum(scores[:, None].abs(), best)
    undecided = ((gap - 2 * jitter).abs() < 1e-6).any(dim=(1, 2)) | (top.diff().abs() < 1e-6).any(dim=1)
    return min(undecided.nonzero().flatten().tolist(), default=len(scores))


@cache
def expected_greedy(checkpoint: Path, prompt: tuple[int, ...], new: int = NEW) -> list[int]:
    """What transformers' own generate() appends to the prompt."""
    below = boundary(checkpoint) + 1 - len(prompt)
    if not FOUR and 0 < below < new:  # another oracle is right on each side
        first = expected_greedy(checkpoint, prompt, below)
        return first + expected_greedy(checkpoint, (*prompt, *first), new - below)
    # transformers 4.57.6 cuts the cached keys to a sliding window at their start but the mask at its end; and where it
    # recomputes the prefix at the boundary its eager attention lacks the causal mask: so no cache with a window, and
    # sdpa
    cached = not (FOUR and read_config(checkpoint).window)
    model = oracle(checkpoint, len(prompt), "sdpa")
    return model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, use_cache=cached)[
        0, len(prompt) :
    ].tolist()
