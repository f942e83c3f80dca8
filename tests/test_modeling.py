"""PyTorch's PhiMoE against the formulas, and against itself: in one pass, in steps, in chunks and in a padded batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from phimoe_onnx import reference
from phimoe_onnx.config import parse_config
from phimoe_onnx.modeling import (
    MODELS,
    PhiMoEForCausalLM,
    Rope,
    Seams,
    experts,
    mixer_weights,
    sparse_mixer,
    with_seams,
)
from tests.checkpoints import BASE, SHAPES, TASKS, assert_close, make_model, random_ids

Row = NDArray[np.float32]


def route(s: Row, eps: float) -> tuple[list[float], list[int]]:
    """SparseMixer for one token, written as the paper says it: two rounds of argmax, mask and softmax."""

    def softmax_at(values: Row, dropped: list[bool], index: int) -> float:
        kept = [-np.inf if drop else float(value) for value, drop in zip(values, dropped, strict=True)]
        exponentials = [np.exp(value - max(kept)) for value in kept]
        return exponentials[index] / sum(exponentials)

    def far(best: np.float32, rival: np.float32) -> bool:
        if best == rival:  # 0 / 0 where both are 0
            return False
        return bool((best - rival) / max(abs(rival), best) > np.float32(2 * eps))

    first = int(np.argmax(s))
    p_first = softmax_at(s, [far(s[first], rival) for rival in s], first)
    rest = s.copy()
    rest[first] = -np.inf
    second = int(np.argmax(rest))
    p_second = softmax_at(rest, [j == first or far(s[second], s[j]) for j in range(len(s))], second)
    return [p_first, p_second], [first, second]


number = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, 1.01, 1.02, 1.03, -1.0, -1.01, -1.02, 0.5, 0.505])
rows = st.lists(number, min_size=2, max_size=20) | st.builds(lambda value, n: [value] * n, number, st.integers(2, 20))


@given(rows, st.sampled_from([0.0, 0.005, 0.01, 0.1, 0.5, 2.0]))
def test_sparse_mixer_is_the_formula(scores: list[float], jitter: float) -> None:
    weights, chosen = sparse_mixer(torch.tensor(scores), jitter)
    expected_weights, expected_chosen = route(np.array(scores, np.float32), jitter)
    assert chosen.tolist() == expected_chosen
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_sparse_mixer_on_a_batch(scale: float, shift: float) -> None:
    scores = torch.from_numpy(np.random.default_rng(0).normal(shift, scale, (3, 50, 16)).astype(np.float32))
    weights, chosen = sparse_mixer(scores, 0.01)
    assert weights.shape == chosen.shape == (3, 50, 2)
    for row, weight, choice in zip(scores.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        expected_weights, expected_chosen = route(row.numpy(), 0.01)
        assert choice.tolist() == expected_chosen
        np.testing.assert_allclose(weight, expected_weights, rtol=1e-5)


@pytest.mark.parametrize(
    ("scores", "chosen", "weights"),
    [
        ([1.0, 5.0, 3.0], [1, 2], [1.0, 1.0]),  # no rival is near: each weighs 1, and they are not renormalised
        ([2.0, 2.0, 2.0, 2.0], [0, 1], [1 / 4, 1 / 3]),  # of equal scores the lower index first
        ([0.0, 0.0], [0, 1], [1 / 2, 1.0]),
        ([-5.0, -1.0, -1.0, -9.0], [1, 2], [1 / 2, 1.0]),
        ([1.0, 0.99, 0.5], [0, 1], [1 / (1 + np.exp(-0.01)), 1.0]),
        ([0.0, -1e-3], [0, 1], [1.0, 1.0]),  # relative to the larger: nothing is near 0
    ],
)
def test_sparse_mixer_by_hand(scores: list[float], chosen: list[int], weights: list[float]) -> None:
    got_weights, got_chosen = sparse_mixer(torch.tensor(scores), 0.01)
    assert got_chosen.tolist() == chosen
    np.testing.assert_allclose(got_weights, weights, rtol=1e-6)


@given(rows, st.data())
def test_mixer_weights_of_given_experts(scores: list[float], data: st.DataObject) -> None:
    """Each given expert takes the place of the round's largest."""
    pair = data.draw(st.permutations(range(len(scores))))[:2]
    weights = mixer_weights(torch.tensor(scores), torch.tensor(pair), 0.1)
    s = np.array(scores, np.float32)
    for place, index in enumerate(pair):
        total = 0.0
        for j, rival in enumerate(s):
            with np.errstate(all="ignore"):
                far = (s[index] - rival) / max(abs(rival), s[index]) > np.float32(0.2)
            if not far and not (place == 1 and j == pair[0]):
                total += np.exp(float(rival) - float(s[index]))
        np.testing.assert_allclose(weights[place], 1 / total, rtol=2e-5)


def test_mixer_weights_of_the_chosen_are_sparse_mixers() -> None:
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32))
    weights, chosen = sparse_mixer(scores, 0.1)
    assert torch.equal(mixer_weights(scores, chosen, 0.1), weights)
    assert ((weights > 0) & (weights <= 1)).all()
    assert (weights < 1).any()


def test_experts_is_the_formula_for_each_token() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(2, 5, 8), torch.randn(6, 2 * 12, 8), torch.randn(6, 8, 12)
    weights, chosen = torch.rand(2, 5, 2), torch.rand(2, 5, 6).topk(2).indices
    got = experts(x, weights, chosen, gate_up, down)
    for b in range(2):
        for s in range(5):
            expected = torch.zeros(8)
            for weight, e in zip(weights[b, s], chosen[b, s], strict=True):
                gate, up = gate_up[e, :12] @ x[b, s], gate_up[e, 12:] @ x[b, s]
                expected += weight * (down[e] @ (gate * gate.sigmoid() * up))
            torch.testing.assert_close(got[b, s], expected)


def test_experts_that_no_token_chose_are_not_computed() -> None:
    model = make_model(BASE)
    ids = random_ids(4)
    recording, routing = reference.recorded(model)
    expected = reference.logits(recording, ids)
    with torch.no_grad():
        for layer, chosen in zip(model.model.layers, routing, strict=True):
            unused = sorted(set(range(16)) - set(chosen.flatten().tolist()))
            assert unused
            layer.block_sparse_moe.experts.gate_up_proj[unused] = np.nan
            layer.block_sparse_moe.experts.down_proj[unused] = np.nan
    assert np.array_equal(reference.logits(model, ids), expected)


@torch.inference_mode()
def forward(
    model: PhiMoEForCausalLM, rows: list[list[int]], chunks: list[int], pad: str = "right", rope_length: int = 0
) -> list[Tensor]:
    """Each row's logits, its padding cut off, the batch having run in chunks of the given lengths."""
    longest = max(map(len, rows))
    assert sum(chunks) == longest

    def padded(row: list[int], filler: int) -> list[int]:
        padding = [filler] * (longest - len(row))
        return row + padding if pad == "right" else padding + row

    ids = torch.tensor([padded(row, 7) for row in rows])
    mask = torch.tensor([padded([1] * len(row), 0) for row in rows])
    cache, outputs, start = model.empty_cache(len(rows)), [], 0
    for chunk in chunks:
        end = start + chunk
        output, cache = model(ids[:, start:end], mask[:, :end], torch.tensor([rope_length]), cache)
        outputs.append(output)
        start = end
    assert cache[0][0].shape == (len(rows), model.config.num_key_value_heads, longest, model.config.head_dim)
    logits = torch.cat(outputs, dim=1)
    return [row_logits[keep.bool()] for row_logits, keep in zip(logits, mask, strict=True)]


@pytest.mark.parametrize("length", [20, 45])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_and_chunks_are_the_one_pass(shape: str, length: int) -> None:
    """Past the rope boundary of 32 the earlier chunks are told the length."""
    model = make_model(BASE | SHAPES[shape])
    row = random_ids(length)
    expected = forward(model, [row], [length])[0]
    assert_close(reference.logits(model, row), expected)
    for chunks in ([1] * length, [length - 1, 1], [7, length - 12, 5]):
        assert_close(forward(model, [row], chunks, rope_length=length)[0], expected)


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_padded_batch_gives_each_row_what_it_gets_alone(shape: str, pad: str) -> None:
    """With longrope the rows lie on both sides of the boundary, and each chooses for itself."""
    model = make_model(BASE | SHAPES[shape])
    rows = [random_ids(length) for length in (45, 3, 32, 33, 1)]
    for row, got in zip(rows, forward(model, rows, [45], pad), strict=True):
        assert_close(got, reference.logits(model, row))


def test_a_row_that_is_padding_alone_is_finite() -> None:
    model = make_model(BASE | SHAPES["window"])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    logits, _ = model(
        torch.zeros(2, 3, dtype=torch.int64), mask, torch.zeros(1, dtype=torch.int64), model.empty_cache(2)
    )
    assert logits.isfinite().all()


@torch.inference_mode()
def test_the_sliding_window_is_exactly_i_minus_j_below_it() -> None:
    """One layer: changing token j moves the logits at i if and only if 0 <= i - j < window."""
    model = make_model(BASE | {"sliding_window": 9, "num_hidden_layers": 1})
    row = random_ids(30)
    expected = reference.logits(model, row)
    for j in (0, 5, 20):
        changed = reference.logits(model, [*row[:j], 2001, *row[j + 1 :]])
        # sums may run in another order elsewhere
        moved = np.abs(changed - expected).max(axis=1) > 1e-4 * expected.std()
        assert moved.nonzero()[0].tolist() == list(range(j, min(j + 9, 30)))


def test_without_a_window_every_later_token_sees_a_change() -> None:
    model = make_model(BASE | {"num_hidden_layers": 1})
    row = random_ids(30)
    expected = reference.logits(model, row)
    moved = np.abs(reference.logits(model, [*row[:5], 2001, *row[6:]]) - expected).max(axis=1) > 1e-4 * expected.std()
    assert moved.nonzero()[0].tolist() == list(range(5, 30))


def test_rope_is_the_formula() -> None:
    config = parse_config(BASE | SHAPES["longrope"])
    assert config.longrope is not None
    cos, sin = Rope(config)(torch.tensor([[0, 5, 31], [1, 2, 40]]), torch.tensor([[32], [33]]))
    factors = [(config.longrope.short_factor, 1.05), (config.longrope.long_factor, 1.2)]
    for row, positions, (factor, mscale) in zip(range(2), ([0, 5, 31], [1, 2, 40]), factors, strict=True):
        for s, position in enumerate(positions):
            angles = [position / (f * 10000 ** (2 * i / 16)) for i, f in enumerate(factor)]
            np.testing.assert_allclose(cos[row, s], np.cos(angles) * mscale, atol=2e-6)
            np.testing.assert_allclose(sin[row, s], np.sin(angles) * mscale, atol=2e-6)


def test_rope_length_forces_the_long_factors() -> None:
    raw = BASE | SHAPES["longrope"]
    model = make_model(raw)
    assert model.config.longrope is not None
    row = random_ids(20)
    short, forced = forward(model, [row], [20])[0], forward(model, [row], [20], rope_length=33)[0]
    assert (short - forced).abs().max() > 0.1 * short.std()
    assert_close(forward(model, [row], [20], rope_length=32)[0], short)
    always = PhiMoEForCausalLM(
        dataclasses.replace(
            model.config, longrope=dataclasses.replace(model.config.longrope, original_max_position_embeddings=1)
        )
    )
    always.load_state_dict(model.state_dict())
    assert_close(forward(always.eval(), [row], [20])[0], forced)


def test_greedy_is_the_argmax_of_whole_passes() -> None:
    for shape in ("longrope", "window"):
        model = make_model(BASE | SHAPES[shape])
        ids = random_ids(25)
        for token in reference.greedy(model, ids, 15):
            assert token == reference.logits(model, ids)[-1].argmax()
            ids.append(token)


def test_replayed_routing_is_the_recorded_one() -> None:
    model, other = make_model(BASE), make_model(BASE, seed=1)
    ids = random_ids(12)
    recording, routing = reference.recorded(model)
    expected = reference.logits(recording, ids)
    recording, own = reference.recorded(other)
    reference.logits(recording, ids)
    assert [chosen.shape for chosen in routing] == [(1, 12, 2)] * 2
    assert not torch.equal(routing[0], own[0])
    assert np.array_equal(reference.logits(reference.replayed(model, routing), ids), expected)
    recording, replayed = reference.recorded(reference.replayed(other, routing))
    reference.logits(recording, ids)
    assert all(torch.equal(a, b) for a, b in zip(replayed, routing, strict=True))


@pytest.mark.parametrize("task", MODELS)
def test_seams_are_handed_in_and_parameters_shared(task: str) -> None:
    """A model with other seams computes with them, over the very parameters of the one that it was made of."""
    model = make_model(BASE | {"tie_word_embeddings": task == "text-generation"} | TASKS[task])
    called: list[str] = []

    def noted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return getattr(model.seams, name)(*arguments)

        return call

    names = ("attention", "sparse_mixer", "experts")
    other = with_seams(model, Seams(**{name: noted(name) for name in names}))
    ids, mask = torch.tensor([random_ids(6)]), torch.ones(1, 6, dtype=torch.int64)
    more = [torch.zeros(1, dtype=torch.int64), model.empty_cache()] if task == "text-generation" else []
    with torch.no_grad():
        expected, got = model(ids, mask, *more), other(ids, mask, *more)
    assert torch.equal(expected[0], got[0])
    assert called == list(names) * 2
    for (name, one), (again, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == again
        assert one.data_ptr() == two.data_ptr()
    assert not other.training
