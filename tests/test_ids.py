"""Ids outside the model's rows are our error at every entrance: a graph of quantised rows has numbers for any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phimoe_onnx import GenerationError, PhiMoE
from phimoe_onnx.runtime.request import make_request

SMALL = Path(__file__).parent.parent / "spec" / "bundle"
Make = Callable[..., Path]


@pytest.fixture(scope="module", params=["int4", "none"])
def model(bundle: Make, request: pytest.FixtureRequest) -> PhiMoE:
    return PhiMoE.load(SMALL if request.param == "int4" else bundle("longrope-window", "cpu", "none"), threads=1)


def bad_ids(rows: int) -> list[Any]:
    ids: list[Any] = [rows, -1, 50_000_000, 2**31, 2**63, -(2**70), np.int64(-1), np.int32(rows), np.uint64(2**64 - 1)]
    return [*([5, id] for id in ids), np.array([5, rows]), np.array([-1, 5], np.int32), np.array([2**63], np.uint64)]


NUMBERS = range(len(bad_ids(0)))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "entrance", ["generate", "stream", "batch", "score", "score batch", "logits", "encode", "request"]
)
def test_text_generation(model: PhiMoE, entrance: str, number: int) -> None:
    bad = bad_ids(model.decoding.vocab_size)[number]
    call: dict[str, Callable[[], Any]] = {
        "generate": lambda: model.generate(bad),
        "stream": lambda: model.generate(bad, stream=True),
        "batch": lambda: model.generate([[5], bad], repetition_penalty=1.1),
        "score": lambda: model.score(bad),
        "score batch": lambda: model.score([[5, 6], bad]),
        "logits": lambda: model.logits(bad),
        "encode": lambda: model.encode(bad),
        "request": lambda: model.request(bad),
    }
    last = model.decoding.vocab_size - 1
    with pytest.raises(GenerationError, match=rf"holds .*, expected token ids from 0 to {last}$"):
        call[entrance]()


@pytest.mark.parametrize("quantize", ["int4", "none"])
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_texts(bundle: Make, task: str, quantize: str) -> None:
    model = PhiMoE.load(bundle("longrope-window", "cpu", quantize, task), threads=1)
    call: Callable[[Any], Any] = model.classify if task == "text-classification" else model.embed
    call([5, model.decoding.vocab_size - 1])
    for bad in bad_ids(model.decoding.vocab_size):
        with pytest.raises(GenerationError, match=r"the text holds .*, expected token ids from 0 to"):
            call(bad)
        with pytest.raises(GenerationError, match=r"text 1 holds .*, expected token ids from 0 to"):
            call([[5, 6], bad])


def test_a_text_whose_tokens_the_model_has_no_rows_for(model: PhiMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = model.decoding.vocab_size
    monkeypatch.setattr(model.tokenizer, "encode", lambda *_, **__: [5, rows])
    conversation = model.chat()
    calls: list[Callable[[], Any]] = [
        lambda: model.generate("a"),
        lambda: list(model.generate([{"role": "user", "content": "a"}], stream=True)),
        lambda: model.score("a"),
        lambda: conversation.send("a"),
    ]
    for call in calls:
        with pytest.raises(GenerationError, match=rf"holds {rows}, expected token ids from 0 to {rows - 1}"):
            call()
    assert conversation.messages == []


def test_what_is_handed_to_the_engine() -> None:
    model = PhiMoE.load(SMALL, threads=1)
    came: list[Any] = []
    requests = [make_request(ids, 256, max_new_tokens=2, repetition_penalty=1.5) for ids in ([5, 6], [5, 2048], [7])]
    model.engine.submit(requests, came.append)
    while model.engine.step():
        pass
    errors = [each for each in came if isinstance(each, Exception)]
    assert [str(error) for error in errors] == ["2048 is no token id, expected 0 to 2047"]
    assert sorted(piece.row for piece in came if piece not in errors and piece.result) == [0, 2]
    with pytest.raises(GenerationError, match="the prompt holds -1, expected token ids from 0"):
        make_request([5, -1], 256)


@pytest.mark.parametrize("id", [2048, -1])
def test_what_is_handed_to_a_decoder(id: int) -> None:
    decoder = PhiMoE.load(SMALL, threads=1).decoder(1, 20)
    decoder.prefill(0, [5, 6])
    calls: list[Callable[[], Any]] = [
        lambda: decoder.prefill(0, [5, id]),
        lambda: decoder.step({0: id}),
        lambda: list(decoder.logits([id, 5])),
    ]
    for call in calls:
        with pytest.raises(GenerationError, match=f"{id} is no token id, expected 0 to 2047"):
            call()
    assert decoder.tokens == {0: [5, 6]}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda logits: logits[:-1], r"returned the shape \[2047\], expected \[2048\]"),
        (lambda logits: np.append(logits, 0), r"returned the shape \[2049\], expected \[2048\]"),
        (lambda logits: None, r"returned the shape \[\], expected \[2048\]"),
        (lambda logits: "the", "returned str, expected an array of 2048 logits"),
        (lambda logits: logits * np.nan, "returned logits whose largest is nan, expected a number"),
        (lambda logits: logits - np.inf, "returned logits whose largest is -inf, expected a number"),
    ],
)
def test_what_a_logits_processor_returns(returned: Callable[[np.ndarray], Any], message: str) -> None:
    model = PhiMoE.load(SMALL, threads=1)
    with pytest.raises(GenerationError, match=message):
        model.generate([5], max_new_tokens=2, logits_processor=lambda _, logits: returned(logits))
