"""Log-probabilities of new tokens: against numpy, beside their tokens, and without any part in the choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phimoe_onnx import Generation, GenerationError, PhiMoE
from phimoe_onnx.runtime import Logprobs
from phimoe_onnx.runtime.logprobs import MOST_LOGPROBS
from phimoe_onnx.runtime.sampling import Choice, Sampling

BUNDLE = Path(__file__).parent.parent / "spec" / "bundle"
PROMPT = "It was a fine morning, and Elizabeth"
DRAWN: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 3}


@pytest.fixture(scope="module")
def model() -> PhiMoE:
    return PhiMoE.load(BUNDLE, threads=1)


def expected(model: PhiMoE, prompt: str, generation: Generation) -> np.ndarray:
    """log softmax of the logits that each new token came from, float64 [n, V]."""
    decoder = model.decoder(1, 200)
    decoder.prefill(0, model.encode(prompt))
    seen: list[np.ndarray] = []

    def look(_: Sequence[int], logits: np.ndarray) -> np.ndarray:
        seen.append(logits.astype(np.float64))
        return logits

    for token in generation.token_ids:
        decoder.choose({0: Choice(Sampling(), (), (), look)})
        decoder.step({0: token})
    logits = np.array(seen)
    result: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return result


def check(model: PhiMoE, prompt: str, generation: Generation, count: int, apart: float = 1e-9) -> None:
    assert generation.logprobs
    assert len(generation.logprobs) == len(generation.token_ids)
    right = expected(model, prompt, generation)
    for found, token, row in zip(generation.logprobs, generation.token_ids, right, strict=True):
        assert found.logprob == pytest.approx(row[token], abs=apart)
        assert len(found.top) == count
        values = [alternative.logprob for alternative in found.top]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, [row[alternative.token_id] for alternative in found.top], atol=apart)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:count], atol=apart)
        for alternative in found.top:
            assert alternative.token_id != token or alternative.logprob == found.logprob


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("count", [1, 5, MOST_LOGPROBS])
def test_they_are_the_models_own_and_change_no_token(model: PhiMoE, options: dict[str, Any], count: int) -> None:
    without = model.generate(PROMPT, max_new_tokens=12, **options)
    assert without.logprobs is None
    found = model.generate(PROMPT, max_new_tokens=12, logprobs=count, **options)
    assert found.token_ids == without.token_ids
    check(model, PROMPT, found, count)
    if not options:
        assert found.logprobs
        assert [each.top[0].token_id for each in found.logprobs] == found.token_ids


def test_a_logits_processor_does_not_show_even_where_it_writes_in_place(model: PhiMoE) -> None:
    def forbid(_: Any, logits: np.ndarray) -> np.ndarray:
        logits[:] = -np.inf
        logits[500] = 0
        return logits

    found = model.generate(PROMPT, max_new_tokens=3, logprobs=2, logits_processor=forbid)
    assert found.token_ids == [500] * 3
    check(model, PROMPT, found, 2)


def test_a_batch_has_each_rows_own(model: PhiMoE) -> None:
    prompts = [PROMPT, "Emma", "And the LORD said unto"]
    for prompt, found in zip(prompts, model.generate(prompts, max_new_tokens=8, logprobs=3), strict=True):
        check(model, prompt, found, 3, apart=0.1)  # a step of several rows rounds other sums to int8


def test_a_streams_pieces_carry_them_beside_their_tokens_also_at_a_stop_string(model: PhiMoE) -> None:
    whole = model.generate(PROMPT, max_new_tokens=30)
    stop = whole.text[20:24]
    pieces = list(model.generate(PROMPT, max_new_tokens=30, stop=stop, logprobs=2, stream=True))
    result = pieces[-1].result
    assert result
    assert result.finish_reason == "stop"
    assert len(result.token_ids) < 30
    assert [piece.token_id for piece in pieces] == result.token_ids
    assert [piece.logprobs for piece in pieces] == result.logprobs
    check(model, PROMPT, result, 2)


def test_texts_of_alternatives_stand_as_behind_other_text(model: PhiMoE) -> None:
    found = model.generate("It was a", max_new_tokens=1, logprobs=20).logprobs
    assert found
    texts = [alternative.text for alternative in found[0].top]
    assert " very" in texts
    assert texts == [model.tokenizer.decode([300, each.token_id])[len(model.tokenizer.decode([300])) :]
                     for each in found[0].top]  # fmt: skip
    [hidden, *_] = model.decoding.hidden_tokens.items()
    assert model.tokenizer.token_text(hidden[1]) == hidden[0]


def test_a_conversation_has_them_too(model: PhiMoE) -> None:
    answer = model.chat().send("Who is Emma?", max_new_tokens=4, logprobs=1)
    assert answer.logprobs
    assert isinstance(answer.logprobs[0], Logprobs)
    assert len(answer.logprobs) == len(answer.token_ids)


@pytest.mark.parametrize("off", [None, 0])
def test_off(model: PhiMoE, off: int | None) -> None:
    assert model.generate(PROMPT, max_new_tokens=2, logprobs=off).logprobs is None
    assert [piece.logprobs for piece in model.generate(PROMPT, max_new_tokens=2, logprobs=off, stream=True)] == [
        None
    ] * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (21, "logprobs is 21, expected 0 .off. to 20"),
        (-1, "logprobs is -1, expected 0 .off. to 20"),
        (True, "logprobs is True, expected an integer"),
        (2.0, "logprobs is 2.0, expected an integer"),
        ("5", "logprobs is '5', expected an integer"),
    ],
)
def test_numbers_out_of_range_are_refused(model: PhiMoE, bad: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate(PROMPT, logprobs=bad)
