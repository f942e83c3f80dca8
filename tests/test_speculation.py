"""Speculation: the same tokens, texts and log-probabilities as without, whatever ends or crosses a draft; and its gate.

The bundles are of native operators: spec/native, and the small model with a window of 40 tokens and a rope boundary
of 96. A dictated text stands for a model that copies: a processor makes the wanted token the likeliest by far.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phimoe_onnx import GenerationError, PhiMoE, export, operators, parity
from phimoe_onnx.runtime.engine import Engine
from phimoe_onnx.runtime.generate import generate
from phimoe_onnx.runtime.ort.per_token import is_per_token
from phimoe_onnx.runtime.row import Generation, Piece
from phimoe_onnx.runtime.slots.host import SharedCache
from phimoe_onnx.runtime.speculation import FAR, FIRST, LONG, NEAR, SHARE, SHORT, SURE, Account, Lookup, Speculation
from tests.checkpoints import MODEL
from tests.toy_bundle import write_bundle

HERE = Path(__file__).parents[1]
TEXT = Path(parity.__file__).with_name("persuasion.txt").read_text(encoding="utf-8")
WINDOW, BOUNDARY, CONTEXT = 40, 96, 1024  # of `austen`
native = pytest.mark.skipif(operators.library() is None, reason="the native operators are not built here")


@pytest.fixture(scope="module")
def small() -> PhiMoE:
    return eager(PhiMoE.load(HERE / "spec" / "native" / "bundle", threads=1))


@pytest.fixture(scope="module")
def austen(tmp_path_factory: pytest.TempPathFactory) -> PhiMoE:
    folder = tmp_path_factory.mktemp("speculation")
    shutil.copytree(MODEL, folder / "checkpoint")
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    config |= {"sliding_window": WINDOW, "original_max_position_embeddings": BOUNDARY}
    config["rope_scaling"] |= {"original_max_position_embeddings": BOUNDARY}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bundle = export(folder / "checkpoint", folder / "bundle", quantize="int4", operators="native")
    return eager(PhiMoE.load(bundle, threads=1))


def eager(model: PhiMoE) -> PhiMoE:
    """The model, which runs every draft: beside what a plain step takes, no pass costs anything."""

    class Free(Account):
        def stepped(self, rows: int, seconds: float) -> None:
            self.token = math.inf

    model.engine.account = Free()
    model.engine.account.token = math.inf
    return model


def passage(model: PhiMoE, length: int, seed: int = 0) -> list[int]:
    """Token ids of the sample text."""
    ids = model.encode(TEXT[:20000])
    start = Random(seed).randrange(len(ids) - length)
    return ids[start : start + length]


Processor = Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]


def dictate(script: Sequence[int], bias: float = 10000.0) -> Processor:
    """A processor that makes the tokens of `script` likelier; behind its end the model is free."""

    def process(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(token_ids) < len(script):
            logits[script[len(token_ids)]] += bias
        return logits

    return process


def facts(pieces: Iterator[Piece]) -> tuple[list[Any], Generation]:
    """All that a stream says but times and counts, and its result."""
    seen = list(pieces)
    result = seen[-1].result
    assert result
    said = (result.text, result.token_ids, result.finish_reason, result.prompt_tokens, result.logprobs)
    return [*((piece.token_id, piece.text, piece.logprobs) for piece in seen), said], result


def same(model: PhiMoE, prompt: list[int], **options: Any) -> Generation:
    """The generation with speculation, which says what the one without says."""
    expected, plain = facts(model.generate(prompt, stream=True, speculate=False, **options))
    found, result = facts(model.generate(prompt, stream=True, **options))
    assert found == expected
    assert plain.drafted == plain.accepted == 0
    assert model.engine._decoder is None
    return result


@native
def test_hundreds_of_texts_are_the_same(small: PhiMoE) -> None:
    """Prompts that repeat something, continued freely or as dictated, in every way to choose a token."""
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.2, "top_k": 20, "seed": 4},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5},
        {"temperature": 1.0, "min_p": 0.1, "seed": 2**63, "logprobs": 3},
        {"repetition_penalty": 1.3, "logprobs": 2},
    ]
    requests = []
    for number in range(150):
        random = Random(number)
        text = passage(small, random.randint(20, 45), number)
        prompt = text + text[: random.randint(10, 20)]
        options = ways[number % len(ways)] | {"max_new_tokens": random.randint(1, 28)}
        if number % 4 == 1:
            options["stop"] = [" of", "e t"]
        if number % 3:  # how far the dictation holds against chance differs
            rest = (text * 2)[len(prompt) - len(text) :]
            changed = [id if random.random() < 0.97 else random.randrange(3, 500) for id in rest]
            options["logits_processor"] = dictate(changed, bias=random.choice([4.0, 1000.0]))
        requests.append(small.request(prompt, **options))
    # without, as many at once as there are slots: it is faster, and the same
    plain: dict[int, list[Piece]] = {}
    for piece in generate(small.engine, [replace(request, speculate=False) for request in requests]):
        plain.setdefault(piece.row, []).append(piece)
    results = []
    for number, request in enumerate(requests):
        found, result = facts(generate(small.engine, [request]))
        assert found == facts(iter(plain[number]))[0]
        results.append(result)
    drafted, accepted = (sum(getattr(result, name) for result in results) for name in ("drafted", "accepted"))
    assert drafted > 300
    assert drafted / 4 < accepted < drafted
    assert {result.finish_reason for result in results} >= {"stop", "length"}


@native
def test_what_is_drafted_and_accepted_is_counted(austen: PhiMoE) -> None:
    text = passage(austen, 100)  # longer than the rope boundary, at which drafts end
    result = same(austen, text + text[:20], max_new_tokens=40, logits_processor=dictate(text[20:60]))
    # after the first token 21 stand elsewhere: 8 more; then 30 do: 16 more; 47: 32, of which 12 fit before the last one
    assert result.token_ids == text[20:60]
    assert (result.drafted, result.accepted) == (8 + 16 + 12, 8 + 16 + 12)
    script = [*text[20:35], 7, 8, 9, *text[38:60]]  # 5 tokens of the second draft are right
    result = same(austen, text + text[:20], max_new_tokens=40, logits_processor=dictate(script))
    assert result.token_ids == script
    # the next one begins when eight tokens stand elsewhere again; less than eight are no draft any more
    assert (result.drafted, result.accepted) == (8 + 16 + 13, 8 + 5 + 13)
    fresh = passage(austen, 50, 1)
    assert same(austen, passage(austen, 50, 2), max_new_tokens=50, logits_processor=dictate(fresh)).drafted == 0


@native
@pytest.mark.parametrize("before", [BOUNDARY - 40, BOUNDARY - 19, BOUNDARY - 9, BOUNDARY, BOUNDARY + 2])
def test_across_the_rope_boundary_and_beyond_the_window(austen: PhiMoE, before: int) -> None:
    text = passage(austen, before - 20)
    prompt = text + text[:20]
    assert len(prompt) == before
    script = (text * 3)[20:100]
    result = same(austen, prompt, max_new_tokens=80, logits_processor=dictate(script), logprobs=1)
    assert result.token_ids == script
    assert result.accepted > 40
    same(austen, prompt, max_new_tokens=80, temperature=0.8, seed=before, logits_processor=dictate(script, 5.0))


@native
def test_a_text_ends_within_a_draft(austen: PhiMoE) -> None:
    """By an end token, a stop string, the number of tokens and the end of the context."""
    end = min(austen.eos)
    text = passage(austen, 100)
    with_end = [*text[:31], end, *text[32:]]
    result = same(austen, with_end + with_end[:20], max_new_tokens=60, logits_processor=dictate(with_end[20:]))
    assert (result.finish_reason, result.token_ids) == ("eos", with_end[20:32])
    assert (result.drafted, result.accepted) == (8 + 16, 8 + 2)
    word = austen.tokenizer.decode(text[33:36]).strip()
    result = same(austen, text + text[:20], stop=[word], logits_processor=dictate(text[20:]))
    assert (result.finish_reason, len(result.token_ids) < 20) == ("stop", True)
    assert result.drafted > result.accepted > 5
    for most in (1, 9, 10, 17, 18, 26):
        result = same(austen, text + text[:20], max_new_tokens=most, logits_processor=dictate(text[20:]))
        assert (result.finish_reason, result.token_ids) == ("length", text[20 : 20 + most])
        assert result.drafted < most
    prompt = (text * 15)[: CONTEXT - 45]
    result = same(austen, prompt, logits_processor=dictate((text * 16)[CONTEXT - 45 :]))
    assert len(result.token_ids) == 45
    assert result.accepted >= 32


@native
def test_rows_beside_each_other(austen: PhiMoE) -> None:
    """Some that copy and some that do not, some ending in a draft; each as alone and without."""
    prompts, expected, requests = [], [], []
    for row in range(7):
        text = passage(austen, 30 + 9 * row, row)
        script = (text * 2)[20:] if row % 2 else passage(austen, 60, 100 + row)
        options: dict[str, Any] = {"max_new_tokens": 30 + 5 * row, "logits_processor": dictate(script, 12.0)}
        options |= {"temperature": 0.7, "seed": row} if row % 3 else {}
        prompts.append(text + text[:20])
        expected.append(austen.generate(prompts[-1], speculate=False, **options).token_ids)
        requests.append(austen.request(prompts[-1], **options))
    came: list[Piece | Exception] = []
    for request in requests:  # they come one by one
        austen.engine.submit([request], came.append)
        austen.engine.step()
    while austen.engine.step():
        pass
    results = {
        tuple(piece.result.token_ids): piece.result for piece in came if isinstance(piece, Piece) and piece.result
    }
    assert sorted(results) == sorted(map(tuple, expected))
    assert sum(result.accepted for result in results.values()) > 60


@native
def test_a_step_has_no_more_tokens_of_drafts_than_a_chunk(small: PhiMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody waits longer than a chunk takes; and none while a prompt is read."""
    ran: list[int] = []
    run_row = SharedCache.run_row

    def row(self: SharedCache, slot: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> Any:
        ran.append(len(ids) if keep > 1 else 1000 + len(ids))
        return run_row(self, slot, ids, past, keep, rope_length)

    monkeypatch.setattr(SharedCache, "run_row", row)
    text = passage(small, 38)
    requests = [
        small.request(text + text[:16], max_new_tokens=40, logits_processor=dictate((text * 2)[16:])) for _ in range(5)
    ]
    came: list[Any] = []
    small.engine.submit(requests[:4], came.append)
    small.engine.step()  # the prompts
    small.engine._decoder.chunk = 20  # type: ignore[union-attr]
    ran.clear()
    small.engine.step()
    assert ran == [9, 9]
    small.engine.submit(requests[4:], came.append)
    ran.clear()
    small.engine.step()
    assert ran == [1020]
    while small.engine.step():
        pass
    assert [piece.result.token_ids for piece in came if piece.result] == [(text * 2)[16:56]] * 5


@native
def test_a_conversation_goes_on_behind_a_draft_that_was_broken_off(austen: PhiMoE) -> None:
    """The cache's places behind a turn's end hold rejected tokens, which no later turn may see."""
    text = passage(austen, 60)
    quoted = austen.tokenizer.decode(text)
    found = []
    for speculate in (None, False):
        chat, turns = austen.chat(), []
        for turn, message in enumerate([quoted + quoted, "Who is Emma?", quoted, "And Anne?"]):
            script = text[: 25 + turn]
            options: dict[str, Any] = {"max_new_tokens": 40, "logits_processor": dictate(script)}
            turns.append(chat.send(message, speculate=speculate, **options))
            assert austen.engine._decoder
            assert not austen.engine._decoder._ahead
        found.append([(turn.token_ids, turn.text, turn.finish_reason) for turn in turns])
        assert sum(turn.drafted - turn.accepted for turn in turns) > 0 or speculate is False
        del chat
    assert found[0] == found[1]


@native
def test_a_row_that_leaves_within_a_draft_leaves_nothing_behind(small: PhiMoE) -> None:
    text = passage(small, 40)
    options: dict[str, Any] = {"max_new_tokens": 30, "logits_processor": dictate(text[20:] + text)}
    expected = small.generate(text + text[:20], speculate=False, **options)
    other = small.generate(text[:9], stream=True, max_new_tokens=60)
    tokens = [next(other).token_id]
    stream = small.generate(text + text[:20], stream=True, **options)
    assert [next(stream).token_id for _ in range(4)] == expected.token_ids[:4]
    stream.close()
    assert small.generate(text + text[:20], **options).token_ids == expected.token_ids

    def fails(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(token_ids) == 9:
            raise LookupError("mine")
        return dictate(text[20:])(token_ids, logits)

    with pytest.raises(LookupError, match="mine"):
        small.generate(text + text[:20], max_new_tokens=30, logits_processor=fails)
    tokens += [piece.token_id for piece in other]
    assert tokens == small.generate(text[:9], max_new_tokens=60, speculate=False).token_ids
    assert small.engine._decoder is None


@native
def test_a_pass_that_fails_is_done_without_a_draft(small: PhiMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    text = passage(small, 40)
    options: dict[str, Any] = {"max_new_tokens": 30, "logits_processor": dictate(text[20:] + text)}
    expected = small.generate(text + text[:20], speculate=False, **options)
    run_row = SharedCache.run_row

    def row(self: SharedCache, slot: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> Any:
        if keep > 1:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 5000000")
        return run_row(self, slot, ids, past, keep, rope_length)

    monkeypatch.setattr(SharedCache, "run_row", row)
    found = small.generate(text + text[:20], **options)
    assert (found.token_ids, found.drafted) == (expected.token_ids, 0)


@native
@pytest.mark.parametrize("width", [2, 9, 16, 33])
def test_several_tokens_at_once_have_the_bits_of_one_by_one(austen: PhiMoE, width: int) -> None:
    for length in (1, 30, BOUNDARY - width, 200):
        ids = passage(austen, length + width, length)
        one, several = austen.decoder(1, 256), austen.decoder(1, 256)
        for decoder in (one, several):
            decoder.prefill(0, ids[:length])
        assert several.room_ahead(0) >= width - 1
        several.run_ahead(0, ids[length], ids[length + 1 :])
        for number, token in enumerate(ids[length:]):
            assert one.step({0: token}) == {}
            if number:
                assert several.take_ahead(0, token)
            assert np.array_equal(one.last_logits([0])[0], several.last_logits([0])[0]), (length, number)
        assert one.tokens == several.tokens


def test_by_itself_it_is_on_only_where_bits_are_the_same(tmp_path: Path) -> None:
    toys = {target: write_bundle(tmp_path / target, target) for target in ("cpu", "portable")}
    for target, toy in toys.items():
        assert not is_per_token((tmp_path / target / "model.onnx").read_bytes())
        model = eager(PhiMoE.load(tmp_path / target, threads=1))
        prompt, script = [9, 40, 17, 300, 12, 7, 45, 60, 31] * 2, [9, 40, 17, 300, 12, 7, 45, 60, 31] * 4
        free = toy.greedy(prompt + script, 20)  # over the boundary, too
        for speculate, drafts in ((None, False), (False, False), (True, True)):
            result = model.generate(prompt, max_new_tokens=56, logits_processor=dictate(script), speculate=speculate)
            assert result.token_ids == script + free
            assert (result.drafted > 0) is drafts
        with pytest.raises(GenerationError, match="speculate is 5, expected True or False"):
            model.generate(prompt, speculate=5)  # type: ignore[call-overload]


def test_it_is_no_option_of_a_device(small: PhiMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "_on_host", False)
    assert not small.request([5]).speculate
    with pytest.raises(GenerationError, match="speculate=True is for device='cpu'"):
        small.request([5], speculate=True)


def test_lookup_finds_what_stands_elsewhere() -> None:
    """Against all places, looked at one by one."""
    for seed in range(12):
        random = Random(seed)
        tokens: list[int] = []
        while len(tokens) < 160:
            start = random.randrange(len(tokens) + 1)
            tokens += tokens[start : start + random.randint(1, 60)] if random.random() < 0.7 else [random.randrange(9)]
        lookup, before, exact = Lookup([]), 0, True
        for end, token in enumerate(tokens, 1):
            lookup.add(token)
            lengths = [
                next((n for n in range(place) if tokens[place - 1 - n] != tokens[end - 1 - n]), place)
                for place in range(1, end)
            ]
            longest = max(lengths, default=0)
            assert (lookup.length > 0) == (longest >= NEAR)
            assert lookup.length <= longest
            if exact and lookup.length == before + 1:
                assert lookup.length == longest
            if not before:
                assert lookup.length in (0, longest)
            exact = lookup.length == longest
            if lookup.length:
                assert lengths[lookup._next - 1] >= lookup.length
                expected = list(tokens[:end])
                for _ in range(LONG):
                    expected.append(expected[lookup._next + len(expected) - end])
                assert lookup.continuation(LONG) == expected[end:]
            before = lookup.length


def simulate(account: Account, prompt: list[int], script: list[int], passes: dict[int, float]) -> float:
    """The time of a text, where a plain step takes 1 and a pass over a draft what `passes` says."""
    row, spent, place = Speculation(account, [*prompt, script[0]]), 0.0, 1
    while place < len(script):
        draft = row.draft(len(script) - place - 1)
        if draft:
            spent += passes[len(draft)]
            row.passed(draft, passes[len(draft)])
        else:
            spent += 1
            account.stepped(1, 1.0)
        for guess in [*draft, None]:
            row.add(script[place])
            place += 1
            if guess != script[place - 1] or place == len(script):
                break
    return spent


PASSES = [lambda n: 1 + 0.08 * n, lambda n: 1 + 0.4 * n, lambda n: 2.0 * n]


@pytest.mark.parametrize("of", PASSES)
def test_drafts_that_fail_cost_a_share_and_no_more(of: Callable[[int], float]) -> None:
    """Whatever a pass takes: a text in which everything seems to be copied, and 20 tokens on is not."""
    passes = {n: of(n) for n in range(1, LONG + 1)}
    random = Random(0)
    book = [random.randrange(1000) for _ in range(5000)]
    script = []
    while len(script) < 4000:
        start = random.randrange(4900)
        script += [*book[start : start + 20], 1000 + random.randrange(1000)]
    account = Account()
    spent = simulate(account, book, script, passes)
    assert spent <= len(script) * (1 + SHARE) + passes[LONG]
    assert account.debt <= passes[LONG]


def test_copying_is_faster_with_and_without_changes() -> None:
    passes = {n: 1 + 0.4 * n for n in range(1, LONG + 1)}  # as on a processor that is the limit itself
    random = Random(1)
    text = [random.randrange(1000) for _ in range(600)]
    account = Account()
    assert simulate(account, text, text, passes) < 600 / 2.2
    changed = [token if place % 60 else 1000 + place for place, token in enumerate(text)]
    assert simulate(account, text, changed, passes) < 600 / 1.3
    assert simulate(Account(), text, text, {n: 2.0 * n for n in range(1, LONG + 1)}) < 600 * (1 + SHARE) + 2 * LONG


def test_drafts_are_long_or_none() -> None:
    text = list(range(100))
    account = Account()
    account.token = 1.0
    for length, first, later in ((NEAR - 1, 0, 0), (SURE - 1, 0, SHORT), (FAR - 1, FIRST, SHORT), (FAR, FIRST, LONG)):
        row = Speculation(account, text + text[:length])
        assert row.draft(99) == text[length : length + first]
        row._won = 1.0
        assert row.draft(99) == text[length : length + later]
    assert Speculation(account, text + text[:40]).draft(FIRST - 1) == []
    row = Speculation(account, [7, *text[:SURE]])
    assert row.draft(99) == []  # it stands nowhere else
    assert Speculation(Account(), text + text[:40]).draft(99) == []  # nothing to compare with is measured yet
    row = Speculation(account, [5, 6] * 10)
    assert row.draft(99) == [5, 6] * (FIRST // 2)
    row.passed([5, 6] * (FIRST // 2), 3.0)
    for token in (5, 6, 5, 7, *text[:4]):
        row.add(token)
    assert (row.drafted, row.accepted) == (8, 3)
    assert (row._won, account.debt) == (1.0, 0.0)  # it took two steps more, and saved three
    other = Speculation(account, text + text[:40])
    other.passed(other.draft(99), 9.0)
    other.add(7)
    assert account.debt == 8.0
    assert Speculation(account, text + text[:40]).draft(99) == []
    assert len(row.draft(99)) == 0  # four tokens are too few
    for token in text[4:NEAR]:
        row.add(token)
    assert row._lookup.length == 0  # they stand nowhere else
    account.stepped(2, 100.0)
    assert account.debt == 8.0 - 100 * SHARE


def test_the_engine_measures_passes_and_steps(small: PhiMoE) -> None:
    engine = Engine(small._decoders.open, small.tokenizer)
    text = passage(small, 40)
    request = small.request(
        text + text[:20], max_new_tokens=30, logits_processor=dictate(text[20:] + text), speculate=True
    )
    results: list[Generation] = []

    def deliver(piece: Piece | Exception) -> None:
        if isinstance(piece, Piece) and piece.result:
            results.append(piece.result)

    engine.submit([request], deliver)
    while engine.step():
        pass
    assert engine.account.token > 0
    assert results[0].drafted > 0
    assert engine.account.debt >= 0
