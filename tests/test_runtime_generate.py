"""Generation and scores on a toy bundle, against the same computation in numpy that knows no cache."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime import Generation, PhiMoE
from phimoe_onnx.runtime.slots import host
from phimoe_onnx.runtime.slots.host import GrowingCache, SharedCache
from tests.toy_bundle import BOUNDARY, CONTEXT, ToyModel, write_bundle

Loaded = tuple[PhiMoE, ToyModel]


@pytest.fixture(scope="module", params=["cpu", "portable"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("bundles") / request.param
    toy = write_bundle(folder, request.param)
    return PhiMoE.load(folder, threads=1), toy


@pytest.fixture
def endless(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """The model without end tokens, so that every row reaches its length."""
    monkeypatch.setattr(loaded[0], "eos", frozenset())
    return loaded


def prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    return [int(id) for id in np.random.default_rng((seed, length)).integers(3, vocab_size, length)]


def tokens(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("length", [1, BOUNDARY, BOUNDARY + 1, CONTEXT])
def test_logits(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, chunk: int, length: int) -> None:
    model, toy = loaded
    monkeypatch.setattr(model._decoders, "decoding", replace(model.decoding, prefill_chunk=chunk))
    ids = prompt(length, model.decoding.vocab_size)
    np.testing.assert_allclose(model.logits(ids), toy.logits(ids), atol=5e-4)


@pytest.mark.parametrize("length", [1, 5, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 50])
def test_greedy_generation_on_both_sides_of_the_boundary(
    endless: Loaded, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    model, toy = endless
    monkeypatch.setattr(model._decoders, "decoding", replace(model.decoding, prefill_chunk=9))
    ids = prompt(length, model.decoding.vocab_size)
    generation = model.generate(ids, max_new_tokens=40)
    assert generation.token_ids == toy.greedy(ids, 40)
    assert (generation.finish_reason, generation.prompt_tokens) == ("length", length)
    assert generation.seconds >= generation.first_token_seconds >= 0


def test_a_batch_gives_each_row_what_it_gets_alone(endless: Loaded) -> None:
    model, toy = endless
    prompts = [prompt(length, model.decoding.vocab_size) for length in (BOUNDARY - 4, 3, BOUNDARY, 40, BOUNDARY - 4)]
    prompts.append(prompts[0])
    assert tokens(model.generate(prompts, max_new_tokens=30)) == [toy.greedy(ids, 30) for ids in prompts]
    options: dict[str, Any] = {
        "max_new_tokens": 30,
        "temperature": 1.5,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 5,
    }
    sampled = tokens(model.generate(prompts, **options))
    assert sampled == [model.generate(ids, **options).token_ids for ids in prompts]
    assert sampled[0] == sampled[-1] != sampled[1]


def test_rows_of_a_batch_end_at_different_steps(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, toy = loaded
    prompts = [prompt(length, model.decoding.vocab_size) for length in (20, 3, 24, 40, 9)]
    whole = [toy.greedy(ids, 20) for ids in prompts]
    for ends in [(3, 19, 0, 7, 11), (0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (5, 5, 5, 5, 5)]:
        eos = frozenset(row[end] for row, end in zip(whole, ends, strict=True))
        monkeypatch.setattr(model, "eos", eos)
        generations = model.generate(prompts, max_new_tokens=20)
        assert tokens(generations) == [toy.greedy(ids, 20, eos) for ids in prompts]
        for generation in generations:
            assert (generation.finish_reason == "eos") == (generation.token_ids[-1] in eos)


def test_a_stream_is_the_generation_piece_by_piece(endless: Loaded) -> None:
    model, _ = endless
    prompts = ["a stop", "the"]
    pieces = list(model.generate(prompts, max_new_tokens=12, stream=True))
    for row, generation in enumerate(model.generate(prompts, max_new_tokens=12)):
        mine = [piece for piece in pieces if piece.row == row]
        assert [piece.token_id for piece in mine] == generation.token_ids
        assert "".join(piece.text for piece in mine) == generation.text
        assert all(piece.result is None for piece in mine[:-1])
        assert mine[-1].result is not None
        assert replace(mine[-1].result, first_token_seconds=0, seconds=0) == replace(
            generation, first_token_seconds=0, seconds=0
        )


def test_the_seed_fixes_the_text(endless: Loaded) -> None:
    model, _ = endless
    # so hot that two draws never agree by chance
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 100.0}
    first = model.generate("a", seed=1, **options)
    assert model.generate("a", seed=1, **options).token_ids == first.token_ids
    assert model.generate("a", seed=2, **options).token_ids != first.token_ids
    fresh = tokens(model.generate(["a", "a"], **options))
    assert fresh[0] != fresh[1]  # without a seed each row has its own


def script(monkeypatch: pytest.MonkeyPatch, model: PhiMoE, text: str, end: str = "<|end|>") -> list[int]:
    """Makes the model say `text`, then `end`, whatever its logits are."""
    ids = model.tokenizer.encode(text) + model.tokenizer.encode(end)
    monkeypatch.setattr("phimoe_onnx.runtime.sampling.sample", lambda logits, sampling, step, seen: ids[step])
    return ids


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ((), "stop, a\n😀 the.", "eos"),
        ("a\n😀", "stop, ", "stop"),
        (["zz", "p, a"], "sto", "stop"),
        ("the.", "stop, a\n😀 ", "stop"),
        ("the. and", "stop, a\n😀 the.", "eos"),
    ],
)
def test_stop_strings(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, stop: str | list[str], text: str, reason: str
) -> None:
    model, _ = loaded
    script(monkeypatch, model, "stop, a\n😀 the.")
    generation = model.generate([{"role": "user", "content": "a"}], stop=stop)
    assert (generation.text, generation.finish_reason) == (text, reason)


def test_half_a_character_is_left_out_where_the_length_cuts_it(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    ids = script(monkeypatch, model, "a 😀")
    generation = model.generate("the", max_new_tokens=4)
    assert (generation.text, generation.token_ids, generation.finish_reason) == (" a ", ids[:4], "length")
    assert model.generate("the", max_new_tokens=4, stop=" and").text == " a "


def test_a_special_token_can_be_a_stop_string(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    script(monkeypatch, model, "a<|user|>b")
    generation = model.generate("the", stop=["<|user|>"])
    assert (generation.text, generation.finish_reason) == (" a", "stop")


def test_the_end_tokens_are_those_of_generation_config(loaded: Loaded) -> None:
    model, _ = loaded
    assert model.eos == {model.tokenizer.token_id("<|endoftext|>"), model.tokenizer.token_id("<|end|>")}


def test_prompts_of_every_kind(endless: Loaded) -> None:
    model, toy = endless
    messages = [{"role": "user", "content": "a stop"}]
    ids = model.tokenizer.encode("<|user|>\na stop<|end|>\n<|assistant|>\n")
    expected = toy.greedy(ids, 5)
    assert model.encode(messages) == ids
    assert model.generate(messages, max_new_tokens=5).token_ids == expected
    assert model.generate(ids, max_new_tokens=5).token_ids == expected
    assert model.generate(list(np.array(ids)), max_new_tokens=5).token_ids == expected
    assert tokens(model.generate([messages, ids, "a"], max_new_tokens=5))[:2] == [expected, expected]
    assert tokens(model.generate([ids], max_new_tokens=5)) == [expected]


def test_none_and_numpys_numbers_and_extremes_are_what_they_mean(endless: Loaded) -> None:
    model, _ = endless
    expected = model.generate("the", max_new_tokens=9).token_ids
    off = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "tools"))
    assert model.generate("the", max_new_tokens=np.int64(9), **off).token_ids == expected  # type: ignore[arg-type]
    for temperature in (1e-308, 5e-324, np.float32(1e-40)):
        cold = model.generate("the", max_new_tokens=9, temperature=temperature, seed=1, repetition_penalty=1e-30)
        greedy = model.generate("the", max_new_tokens=9, repetition_penalty=1e-30)
        assert cold.token_ids == greedy.token_ids
    rows = np.array([prompt(5, 60), prompt(5, 60, 1)])
    assert tokens(model.generate(rows, max_new_tokens=5)) == tokens(  # type: ignore[call-overload]
        model.generate(rows.tolist(), max_new_tokens=5)
    )


def test_cleaned_text_is_held_back_until_it_is_certain(endless: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = endless
    ids = model.tokenizer.encode("the a . the , b .")
    monkeypatch.setattr(model.tokenizer, "clean_up", True)

    def forced(new: Sequence[int], logits: Any) -> Any:
        logits[:] = -1.0
        logits[ids[len(new)]] = 1.0
        return logits

    options: dict[str, Any] = {"max_new_tokens": len(ids), "logits_processor": forced}
    assert model.generate([5], **options).text.strip() == "the a. the, b."
    pieces = [piece.text for piece in model.generate([5], stream=True, **options)]
    assert "".join(pieces).strip() == "the a. the, b."
    assert model.generate([5], stop=",", **options).text.strip() == "the a. the"
    for length in range(1, len(ids)):
        cut = model.generate([5], **options | {"max_new_tokens": length}).text
        assert cut.strip() == model.tokenizer.decode(ids[:length]).strip()


def test_score(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, toy = loaded
    monkeypatch.setattr(model._decoders, "decoding", replace(model.decoding, prefill_chunk=5))
    text = "the stop, a the the stop. and so, the a stop. the and the"
    score = model.score(text)
    ids = model.tokenizer.encode(text)
    assert len(ids) > BOUNDARY
    logits = toy.logits(ids).astype(np.float64)
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    assert score.token_ids == ids
    assert score.logprobs.dtype == np.float32
    np.testing.assert_allclose(score.logprobs, expected, atol=5e-4)
    assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)
    assert model.score(ids).logprobs.tolist() == score.logprobs.tolist()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        (["a", ""], {}, "prompt 1 is empty"),
        (["a", []], {}, "prompt 1 is empty"),
        ([1, 10**6], {}, "holds 1000000, expected token ids"),
        ([1, -1], {}, "holds -1"),
        ([1, "a"], {}, "holds 'a'"),
        ([5] * CONTEXT, {}, f"has {CONTEXT} tokens, which leaves no room in the context of {CONTEXT}"),
        (
            [5] * 10,
            {"max_new_tokens": CONTEXT - 9},
            f"has 10 tokens and max_new_tokens is {CONTEXT - 9}.*at most {CONTEXT - 10}",
        ),
        ([[5], [5] * CONTEXT], {}, "prompt 1 has"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"stop": ["a", ""]}, "empty string"),
        ("a", {"temperature": -1.0}, "temperature is -1"),
        ([{"role": "user"}], {}, "refuses the messages"),
        ([{"content": "a"}], {}, "expected"),
        (None, {}, "the prompt is of type NoneType, expected a string"),
        (b"a", {}, "the prompt is of type bytes, expected a string"),
        ([b"a"], {}, "prompt 0 is of type bytes"),
        ({"role": "user", "content": "a"}, {}, "the prompt is of type dict"),
        ([True], {}, "holds True, expected token ids"),
        ("a\ud800", {}, "the prompt holds '.ud800' at character 1, which is half a character"),
        (100 * CONTEXT * "stop ", {}, "of which the first .* are more tokens than the context"),
        ("a", {"stop": "\udc00"}, "stop holds .* half a character"),
        ("a", {"stop": b"a"}, "stop is b'a', expected a string"),
        ("a", {"stop": [5]}, "stop holds 5, expected strings"),
        ("a", {"stop": 5}, "stop is 5, expected a string"),
        ("a", {"max_tokens": 5}, r"max_tokens is no option; did you mean max_new_tokens\?"),
        ("a", {"temprature": 5}, r"temprature is no option; did you mean temperature\?"),
        ("a", {"zzz": 5}, "zzz is no option; known ones are logits_processor, logprobs, max_new_tokens, "),
        ("a", {"max_new_tokens": 5.0}, "max_new_tokens is 5.0, expected an integer"),
        ("a", {"max_new_tokens": True}, "max_new_tokens is True, expected an integer"),
        ("a", {"top_k": "5"}, "top_k is '5', expected an integer"),
        ("a", {"seed": 0.5}, "seed is 0.5, expected an integer"),
        ("a", {"temperature": "1"}, "temperature is '1', expected a number"),
        ("a", {"temperature": 10**400}, "temperature has more digits than a float holds"),
        ("a", {"repetition_penalty": 1e-45}, "repetition_penalty is 1e-45, expected 1e-30 to 1e30"),
        ([{"role": "user", "content": "a"}], {"tools": [5]}, "tools holds 5, expected a JSON schema"),
        ([{"role": "user", "content": "a"}], {"tools": 5}, "tools is 5, expected a list of JSON schemas"),
        ([{"role": "tool", "content": "a"}], {}, "no tools"),
        (np.array(5), {}, "the prompt is of type ndarray"),
        (memoryview(b"ab"), {}, "the prompt is of type memoryview"),
        ([np.array(5)], {}, "prompt 0 is of type ndarray"),
        ("a", {"logits_processor": 0}, "logits_processor is 0, expected a function"),
        ("a", {"stop": np.array(1)}, "stop is array"),
        ("a", {"max_new_tokens": "9" * 5000}, "max_new_tokens is '999.{0,90}', expected an integer"),
        ("a", {"max_new_tokens": 10**5000}, "max_new_tokens is a int of too many digits"),
        ("a", {"top_k": -(10**5000)}, "top_k is a int of too many digits"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_prompts_and_options_are_named_at_once(
    loaded: Loaded, given: Any, options: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(GenerationError, match=message):
        loaded[0].generate(given, stream=stream, **options)


def test_bad_texts_to_score_are_named(loaded: Loaded) -> None:
    for given, message in (
        ("", "the text is empty"),
        ([5], "the text has one token"),
        ([5] * (CONTEXT + 1), f"{CONTEXT + 1} tokens"),
        (["a stop", ""], "text 1 is empty"),
        ([[5, 6], [5]], "text 1 has one token"),
        (np.array([[5, 6], [5, -1]]), "text 1 holds .*-1.*, expected token ids from 0"),
        (np.array(5), "the text is of type ndarray, expected a string"),
        (np.zeros((2, 2, 2), int), "text 0 is an array of the shape \\[2, 2\\]"),
        (np.array([5.0, 6.0]), "text 0 is of type float64, expected a string"),
        (5, "the text is of type int, expected a string"),
        (None, "the text is of type NoneType, expected a string"),
    ):
        with pytest.raises(GenerationError, match=message):
            loaded[0].score(given)


def test_a_batch_of_scores_is_what_each_text_gets_alone(loaded: Loaded) -> None:
    model, _ = loaded
    texts: list[Any] = ["the stop, a the the stop. and", [5, 6, 7], "a the"]
    scores = model.score(texts)
    for score, text in zip(scores, texts, strict=True):
        alone = model.score(text)
        assert score.token_ids == alone.token_ids
        np.testing.assert_array_equal(score.logprobs, alone.logprobs)
    array = np.array([[5, 6, 7, 8], [9, 5, 9, 5]])
    rows = model.score(array)  # type: ignore[call-overload]
    assert [row.token_ids for row in rows] == array.tolist()
    np.testing.assert_array_equal(rows[1].logprobs, model.score([9, 5, 9, 5]).logprobs)
    assert model.score([]) == []


def test_the_whole_context_can_be_used(endless: Loaded) -> None:
    model, _ = endless
    assert len(model.generate([5] * (CONTEXT - 3)).token_ids) == 3


def test_a_conversation_computes_only_what_is_new(endless: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, toy = endless
    monkeypatch.setattr(host, "round_up", lambda capacity: capacity)  # so that the second turn needs longer buffers
    chat = model.chat(system="a")
    ran: list[int] = []
    cache = SharedCache if model.decoding.cache.shared else GrowingCache
    run_row = cache.run_row

    def counted(self: Any, slot: int, ids: list[int], *rest: int) -> Any:
        ran.extend(ids if len(ids) > 1 else [])
        return run_row(self, slot, ids, *rest)

    monkeypatch.setattr(cache, "run_row", counted)
    first = chat.send("the", max_new_tokens=4)
    rendered = model.encode(chat.messages[:2])
    assert ran == rendered
    assert first.token_ids == toy.greedy(rendered, 4)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1]["content"] == first.text

    # a second turn on an answer that is in the cache as it is in the text
    chat.messages[-1] = {"role": "assistant", "content": model.tokenizer.decode(first.token_ids)}
    assert model.engine._decoder
    [slot] = model.engine._parked.values()
    held = list(model.engine._decoder.tokens[slot])
    ran.clear()
    second = chat.send("stop", max_new_tokens=30)
    rendered = model.encode(chat.messages[:-1])
    shared = next((i for i, (a, b) in enumerate(zip(held, rendered, strict=False)) if a != b), len(held))
    assert shared > 5
    assert second.prompt_tokens == len(rendered) <= BOUNDARY
    assert second.token_ids == toy.greedy(rendered, 30)  # crosses the boundary
    assert ran[: len(rendered) - shared] == rendered[shared:]

    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]
    assert chat.send("the", max_new_tokens=4).token_ids == first.token_ids  # back below the boundary


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_came(endless: Loaded) -> None:
    model, _ = endless
    chat = model.chat()
    stream = chat.send("the", stream=True, max_new_tokens=20)
    begun = [next(stream).text for _ in range(5)]
    stream.close()
    assert chat.messages == [{"role": "user", "content": "the"}, {"role": "assistant", "content": "".join(begun)}]
    with pytest.raises(GenerationError, match="empty"):
        chat.send("")
    with pytest.raises(GenerationError, match="the message is of type ndarray, expected a string"):
        chat.send(np.array([1, 2]))  # type: ignore[call-overload]
    assert len(chat.messages) == 2


def test_pieces_come_row_by_row_in_each_step(endless: Loaded) -> None:
    rows = [piece.row for piece in endless[0].generate(["a", "the", "stop"], max_new_tokens=3, stream=True)]
    assert rows == [0, 1, 2] * 3
    assert all(a != b for a, b in pairwise(rows))
