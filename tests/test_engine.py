"""The engine: whoever comes, waits, pauses or leaves, each request gets the tokens that it gets alone.

The small model's bundle, float32 and int4, over each of the three caches; the device's runs on the CPU provider. A
kernel may add up one row's numbers in another order than those of several, and of a chunk in another than of a step, so
a request is only used if each of its tokens was chosen with a margin, as in spec/make_cases.py. PHIMOE_EXAMPLES sets
how many schedules are tried of each combination, 6 if not given.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phimoe_onnx import EngineFullError, GenerationError, OutOfMemoryError, PhiMoE, export, parity
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.exporter.sampling import sampling_graph
from phimoe_onnx.runtime.engine import Engine
from phimoe_onnx.runtime.generate import PieceStream, generate
from phimoe_onnx.runtime.ort.threads import Sessions
from phimoe_onnx.runtime.request import Request
from phimoe_onnx.runtime.row import Generation, Piece
from phimoe_onnx.runtime.sampling import draw, penalize, sample, uniform
from phimoe_onnx.runtime.slots.host import SharedCache
from phimoe_onnx.text.template import ChatTemplate
from phimoe_onnx.text.tokenizer import Tokenizer
from tests.checkpoints import MODEL

TEXT = Path(parity.__file__).with_name("persuasion.txt").read_text(encoding="utf-8")
EXAMPLES = int(os.environ.get("PHIMOE_EXAMPLES", "6"))
CHUNK = 48  # of a prompt, so that the longer ones take several
GAP = 0.1  # between the chosen token's logit and the nearest other one
DISTANCE = 0.01  # of a draw's random number from where it would choose another token

Load = Callable[..., PhiMoE]


class NearTieError(Exception):
    """A token was chosen without the margin."""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """load(quantize, cache, **options) -> the small model with an engine of its own and no end tokens."""
    folders: dict[str, Path] = {}
    sessions: dict[str, ort.InferenceSession] = {}
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sampler = ort.InferenceSession(ir.to_proto(sampling_graph()).SerializeToString(), options)

    def make(quantize: str = "none", cache: str = "shared", **given: Any) -> PhiMoE:
        if quantize not in folders:
            folders[quantize] = export(
                MODEL, tmp_path_factory.mktemp("engine") / quantize, quantize=quantize, operators="stock"
            )
            sessions[quantize] = ort.InferenceSession(str(folders[quantize] / "model.onnx"), options)
        folder, manifest = folders[quantize], read_manifest(folders[quantize])
        shape = replace(manifest.decoding.cache, shared=cache != "growing")
        decoding = replace(manifest.decoding, cache=shape, prefill_chunk=CHUNK)
        tokenizer = Tokenizer(folder, manifest.decoding.hidden_tokens.values())
        model = PhiMoE(
            Sessions(sessions[quantize]), replace(manifest, decoding=decoding), tokenizer, ChatTemplate(folder),
            sampling=sampler if cache == "device" else None, **given,
        )  # fmt: skip
        model.eos = frozenset()
        return model

    return make


@pytest.fixture(scope="module")
def model(load: Load) -> PhiMoE:
    """Float32, on the host, with three slots."""
    return load(slots=3)


def windows(model: PhiMoE, length: int, seed: int = 0) -> list[int]:
    """Token ids of the sample text."""
    ids = model.encode(TEXT[:20000])
    start = Random(seed).randrange(len(ids) - length)
    return ids[start : start + length]


def with_margin(request: Request) -> Request:
    """The same request, which fails where a small difference of the logits may choose another token."""
    sampling = request.sampling

    def look(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = {*request.prompt, *token_ids}
        chosen = sample(logits, sampling, len(token_ids), seen)
        scores = penalize(logits, seen, sampling.repetition_penalty)
        if np.partition(np.abs(scores - scores[chosen]), 1)[1] < GAP:
            raise NearTieError
        if sampling.temperature > 0:
            near = np.clip(uniform(sampling.seed, len(token_ids)) + np.array([-DISTANCE, DISTANCE]), 0, 1 - 2**-53)
            if {draw(scores, sampling, float(u)) for u in near} != {chosen}:
                raise NearTieError
        return logits

    return replace(request, logits_processor=look)


def alone(model: PhiMoE, request: Request) -> Generation:
    *_, last = generate(model.engine, [request])
    assert last.result
    return last.result


def said(generation: Generation | None) -> tuple[Any, ...]:
    """All but the times."""
    assert generation
    return generation.text, generation.token_ids, generation.finish_reason, generation.prompt_tokens


def assert_empty(engine: Engine) -> None:
    """Nobody has a slot, nothing waits, no memory is held."""
    assert not any((engine._arrived, engine._prefilling, engine._running, engine._parked, engine._left))
    assert engine._decoder is None


@pytest.fixture(scope="module")
def pool(load: Load) -> Callable[[str], list[tuple[Request, Generation]]]:
    """pool(quantize) -> requests of many kinds and lengths whose tokens have the margin, and what each gives alone."""
    known: dict[str, list[tuple[Request, Generation]]] = {}
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        ([1, 47, 48, 120], {"max_new_tokens": 12}),
        ([243, 255, 256, 300], {"max_new_tokens": 16}),  # around the rope boundary of 256
        ([20], {"max_new_tokens": 14, "repetition_penalty": 1.3}),
        ([252], {"max_new_tokens": 7, "temperature": 0.6, "top_p": 0.8, "seed": 11}),
        ([30], {"max_new_tokens": 6, "temperature": 0.6, "top_k": 5, "repetition_penalty": 1.1, "seed": 5}),
        ([249], {"max_new_tokens": 16, "stop": [",", "."]}),
    ]

    def find(model: PhiMoE, length: int, options: dict[str, Any]) -> tuple[Request, Generation]:
        for seed in itertools.count():
            request = model.request(windows(model, length, seed), **options)
            try:
                return request, alone(model, with_margin(request))
            except NearTieError:
                continue
        raise AssertionError

    def make(quantize: str) -> list[tuple[Request, Generation]]:
        if quantize not in known:
            model = load(quantize)
            known[quantize] = [find(model, length, options) for lengths, options in kinds for length in lengths]
        return known[quantize]

    return make


class Reader:
    """Reads a stream, some pieces at a time, and drops it after `leaves` of them if that is given."""

    def __init__(
        self, engine: Engine, request: Request, expected: Generation, leaves: int | None, session: str | None
    ) -> None:
        self.stream: PieceStream | None = generate(engine, [request], session)
        self.expected, self.leaves = expected, leaves
        self.pieces: list[Piece] = []

    def read(self, count: int) -> None:
        """Reads so many pieces, and holds them to what is expected."""
        for _ in range(count):
            if len(self.pieces) == self.leaves:
                self.stream = None  # as a caller that forgets it
            if self.stream is None:
                break
            self.pieces.append(next(self.stream))
            if result := self.pieces[-1].result:
                assert said(result) == said(self.expected)
                assert list(self.stream) == []
                self.stream = None
        token_ids = [piece.token_id for piece in self.pieces]
        assert token_ids == self.expected.token_ids[: len(token_ids)]
        assert self.expected.text.startswith("".join(piece.text for piece in self.pieces))


@pytest.mark.parametrize("cache", ["shared", "growing", "device"])
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_each_request_gets_the_tokens_that_it_gets_alone(
    load: Load, pool: Callable[[str], list[tuple[Request, Generation]]], quantize: str, cache: str
) -> None:
    """Whatever arrives when, whoever pauses, whoever leaves, and whatever a session has left in its slot."""
    requests, model = pool(quantize), load(quantize, cache, slots=3)
    # which request, when it comes, after how many pieces it leaves, and the session
    arrivals = st.tuples(
        st.integers(0, len(requests) - 1),
        st.integers(0, 8),
        st.none() | st.integers(0, 6),
        st.sampled_from([None, None, "Emma", "Anne"]),
    )

    @given(st.lists(arrivals, min_size=3, max_size=8), st.randoms(use_true_random=False))
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize="PHIMOE_EXAMPLES" not in os.environ, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    def run(schedule: list[tuple[int, int, int | None, str | None]], random: Random) -> None:
        coming = sorted(schedule, key=lambda arrival: arrival[1])
        readers: list[Reader] = []
        for now in itertools.count():
            while coming and coming[0][1] <= now:
                number, _, leaves, session = coming.pop(0)
                readers.append(Reader(model.engine, *requests[number], leaves, session))
            if readers:
                reader = random.choice(readers)  # the others pause
                reader.read(random.randint(1, 4))
                readers = [each for each in readers if each.stream is not None]
            if model.engine._decoder:
                assert model.engine._decoder.tokens.keys() <= set(range(3))
            if not (coming or readers):
                break
        for session in ("Emma", "Anne"):
            model.engine.forget(session)
        assert_empty(model.engine)

    run()


@pytest.mark.parametrize("cache", ["shared", "growing", "device"])
def test_callers_in_many_threads(
    load: Load, pool: Callable[[str], list[tuple[Request, Generation]]], cache: str
) -> None:
    requests, model = pool("none"), load("none", cache, slots=4)
    found: dict[int, Generation] = {}

    def call(number: int) -> None:
        found[number] = alone(model, requests[number][0])

    threads = [threading.Thread(target=call, args=[number]) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said(found[number]) for number in range(len(requests))] == [said(expected) for _, expected in requests]
    assert_empty(model.engine)


def test_a_batch_of_more_rows_than_slots(
    model: PhiMoE, pool: Callable[[str], list[tuple[Request, Generation]]]
) -> None:
    requests = pool("none")
    results = {p.row: p.result for p in generate(model.engine, [request for request, _ in requests]) if p.result}
    assert [said(results[row]) for row in range(len(requests))] == [said(expected) for _, expected in requests]
    assert_empty(model.engine)


def test_a_full_engine_says_so(load: Load) -> None:
    model = load(slots=2, queue=1)
    streams = [model.generate([5 + number], stream=True, max_new_tokens=9) for number in range(4)]
    tokens = [next(stream).token_id for stream in streams[:2]]
    waiting: deque[Piece | Exception] = deque()
    model.engine.submit([model.request([9], max_new_tokens=2)], waiting.append)
    with pytest.raises(EngineFullError, match="all 2 slots are taken and 1 requests wait, of 1 that may"):
        next(streams[2])
    streams[0].close()  # the one that waits has its slot now
    tokens.append(next(streams[3]).token_id)
    assert tokens == [model.generate([5 + number], max_new_tokens=1).token_ids[0] for number in (0, 1, 3)]
    for stream in streams:
        stream.close()
    while model.engine.step():
        pass
    assert len(waiting) == 2
    assert_empty(model.engine)


@pytest.mark.parametrize(("option", "value"), [("slots", 0), ("queue", -1), ("capacity", 0)])
def test_bounds_out_of_range_are_named(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(GenerationError, match=f"{option} is {value}, expected"):
        PhiMoE.load(tmp_path, **{option: value})  # type: ignore[arg-type]


def test_capacity_bounds_a_request(load: Load) -> None:
    model = load(capacity=20)
    assert len(model.generate([5] * 12).token_ids) == 8
    with pytest.raises(GenerationError, match="more than the context of 20"):
        model.generate([5] * 12, max_new_tokens=9)


def test_a_long_prompt_goes_chunk_by_chunk_between_steps(model: PhiMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is computed again at the rope boundary; and the chunks are those of the prompt alone."""
    ran: list[Any] = []
    run_row, run_step = SharedCache.run_row, SharedCache.run_step

    def row(self: SharedCache, slot: int, ids: Sequence[int], *rest: int) -> Any:
        ran.append(len(ids))
        return run_row(self, slot, ids, *rest)

    def step(self: SharedCache, tokens: Any, lengths: Any) -> None:
        ran.append("step")
        run_step(self, tokens, lengths)

    monkeypatch.setattr(SharedCache, "run_row", row)
    monkeypatch.setattr(SharedCache, "run_step", step)
    prompt = windows(model, 250)
    model.generate(prompt, max_new_tokens=9)  # reaches 257
    chunks = [number for number in ran if number != "step"]
    assert chunks == [CHUNK] * 5 + [10] + [CHUNK] * 5 + [16]
    short = model.generate([5, 6], stream=True, max_new_tokens=100)
    next(short)
    ran.clear()
    long = model.generate(prompt, stream=True, max_new_tokens=9)
    for _ in range(9):
        next(long)
    assert [number for number in ran if number != "step"] == chunks
    assert all("step" in pair for pair in itertools.pairwise(ran))


def test_short_prompts_share_a_step(model: PhiMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to `prefill_chunk` tokens of several prompts run between two steps; and each waiting prompt has its turn."""
    ran: list[int] = []
    run_row = SharedCache.run_row

    def row(self: SharedCache, slot: int, ids: Sequence[int], *rest: int) -> Any:
        ran.append(len(ids))
        return run_row(self, slot, ids, *rest)

    monkeypatch.setattr(SharedCache, "run_row", row)
    requests = [model.request([5] * length, max_new_tokens=2) for length in (100, 20, 28)]
    came: list[Any] = []
    rows = model.engine.submit(requests, came.append)
    runs = []
    while model.engine.step():
        runs.append(ran.copy())
        ran.clear()
    assert runs[:3] == [[48], [20, 28], [48]]
    assert all(row.ended for row in rows)


def test_an_error_reaches_its_own_caller_only(model: PhiMoE) -> None:
    def fails(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(token_ids) == 2:
            raise LookupError("mine")
        return logits

    def nonsense(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits * np.float32(np.nan if len(token_ids) == 3 else 1)

    expected = model.generate([5, 6], max_new_tokens=12).token_ids
    good = model.generate([5, 6], stream=True, max_new_tokens=12)
    tokens = [next(good).token_id]
    with pytest.raises(LookupError, match="mine"):
        model.generate([7], max_new_tokens=5, logits_processor=fails)
    with pytest.raises(GenerationError, match="whose largest is nan"):
        model.generate([7], max_new_tokens=5, logits_processor=nonsense)
    with pytest.raises(GenerationError, match="in the middle of a step"):
        model.generate([7], logits_processor=lambda *_: model.generate([8], max_new_tokens=1))  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match=r"returned the shape \[3\], expected \[2048\]"):
        model.generate([7], logits_processor=lambda token_ids, logits: logits[:3])
    tokens += [piece.token_id for piece in good]
    assert tokens == expected
    assert_empty(model.engine)


def test_a_step_that_fails_ends_those_rows_only_that_fail_alone(model: PhiMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [model.generate([5, 6 + row], max_new_tokens=6).token_ids for row in range(3)]
    run_row, run_step = SharedCache.run_row, SharedCache.run_step

    def step(self: SharedCache, tokens: Any, lengths: Any) -> None:
        if 1 in tokens and lengths[1] == 4:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 5000000")
        run_step(self, tokens, lengths)

    def row(self: SharedCache, slot: int, ids: Sequence[int], past: int, *rest: int) -> Any:
        if slot == 1 and past == 4:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 5000000")
        return run_row(self, slot, ids, past, *rest)

    monkeypatch.setattr(SharedCache, "run_step", step)
    monkeypatch.setattr(SharedCache, "run_row", row)
    came: list[list[Piece | Exception]] = [[], [], []]
    for number in range(3):
        model.engine.submit([model.request([5, 6 + number], max_new_tokens=6)], came[number].append)
    while model.engine.step():
        pass
    *before, last = came[1]
    assert isinstance(last, OutOfMemoryError)
    assert "5.00 MB of it were not to be had" in str(last)
    tokens = [[piece.token_id for piece in row if isinstance(piece, Piece)] for row in (came[0], before, came[2])]
    assert tokens == [expected[0], expected[1][:3], expected[2]]
    assert_empty(model.engine)


def test_memory_for_a_newcomer_is_his_matter(load: Load) -> None:
    """A cache on a device under a limit: two rows have room, a third has not; a parked slot makes way."""
    model = load("none", "device")
    cache = model.decoding.cache.bytes_per_token * 256
    model = load("none", "device", cache_limit=2 * cache)
    chat = model.chat()
    chat.send("Who is Emma?", max_new_tokens=3)
    streams = [model.generate([5, number], stream=True, max_new_tokens=9) for number in range(3)]
    tokens = [[next(stream).token_id] for stream in streams[:2]]
    assert not model.engine._parked
    with pytest.raises(OutOfMemoryError, match="a cache of 3 x 256 tokens takes"):
        next(streams[2])
    for number in range(2):
        tokens[number] += [piece.token_id for piece in streams[number]]
    assert tokens == [model.generate([5, number], max_new_tokens=9).token_ids for number in range(2)]
    assert_empty(model.engine)


@pytest.mark.parametrize("cache", ["shared", "growing", "device"])
def test_a_row_that_takes_over_a_slot_does_not_see_what_was_there(load: Load, cache: str) -> None:
    model = load("none", cache, slots=2)
    prompts = [windows(model, length, seed=length) for length in (60, 20, 31, 7)]
    expected = [model.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
    first, second = (model.generate(prompt, stream=True, max_new_tokens=8) for prompt in prompts[:2])
    tokens = [[next(first).token_id], [next(second).token_id]]
    first.close()
    for prompt in prompts[2:]:
        tokens.append(model.generate(prompt, max_new_tokens=8).token_ids)
    tokens[1] += [piece.token_id for piece in second]
    assert tokens == [expected[0][:1], *expected[1:]]


@pytest.mark.parametrize("cache", ["shared", "growing", "device"])
def test_a_processor_changes_the_logits_of_its_row(load: Load, cache: str) -> None:
    model = load("none", cache)
    free = model.generate([5, 6], max_new_tokens=6).token_ids
    looked: list[tuple[int, ...]] = []

    def without_first(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        looked.append(tuple(token_ids))
        assert logits.dtype == np.float32
        logits[free[0]] = -np.inf
        return logits

    other = model.generate([5, 6], stream=True, max_new_tokens=6, repetition_penalty=1.2)
    tokens = [next(other).token_id]
    banned = model.generate([5, 6], max_new_tokens=6, repetition_penalty=1.2, logits_processor=without_first)
    tokens += [piece.token_id for piece in other]
    assert free[0] not in banned.token_ids
    assert looked == [tuple(banned.token_ids[:count]) for count in range(6)]
    assert tokens == model.generate([5, 6], max_new_tokens=6, repetition_penalty=1.2).token_ids


def test_streams_that_are_dropped_free_their_slots(model: PhiMoE) -> None:
    streams = [model.generate([5, 6], stream=True, max_new_tokens=50) for _ in range(4)]  # the last one waits
    for stream in streams[:3]:
        next(stream)
    assert len(model.engine._running) == 3
    del stream, streams
    gc.collect()
    assert_empty(model.engine)


def test_a_conversation_parks_its_slot_and_a_forgotten_one_frees_it(model: PhiMoE) -> None:
    chats = [model.chat() for _ in range(2)]
    for chat in chats:
        chat.send("Who is Emma?", max_new_tokens=4)
    assert len(model.engine._parked) == 2
    assert model.engine._decoder
    assert len(model.generate(["a", "b", "c"], max_new_tokens=3)) == 3  # needs all three slots
    assert not model.engine._parked
    again = [chat.send("And Anne?", max_new_tokens=4).token_ids for chat in chats]
    assert again[0] == again[1]
    assert len(model.engine._parked) == 2
    del chat, chats
    gc.collect()
    assert_empty(model.engine)


def test_memory_shrinks_to_what_is_parked(model: PhiMoE) -> None:
    chat = model.chat()
    first = chat.send("Who is Emma?", max_new_tokens=4)
    assert model.generate([[5], [5, 6]], max_new_tokens=3)
    assert model.engine._decoder
    assert model.engine._decoder._cache.slots <= 2
    chat.messages = []
    assert said(chat.send("Who is Emma?", max_new_tokens=4)) == said(first)


def test_a_turn_in_many_threads_is_right_or_an_error(model: PhiMoE) -> None:
    chat = model.chat()
    failed: list[Exception] = []

    def talk(number: int) -> None:
        for turn in range(6):
            try:
                chat.send(f"{number} {turn}", max_new_tokens=2)
            except GenerationError as error:
                failed.append(error)

    threads = [threading.Thread(target=talk, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {" ".join(str(error).split()[:3]) for error in failed} <= {"the conversation is", "the conversation has"}
    assert len(chat.messages) == 2 * (48 - len(failed)) > 0
    contents = [message["content"] for message in chat.messages[::2]]
    assert len(set(contents)) == len(contents)


def test_a_conversation_takes_a_turn_at_a_time(model: PhiMoE) -> None:
    chat = model.chat()
    stream = chat.send("Who is Emma?", stream=True, max_new_tokens=5)
    late = chat.send("Who is Anne?", stream=True, max_new_tokens=5)
    next(stream)
    with pytest.raises(GenerationError, match="in the middle of another answer"):
        chat.send("Who is Anne?", max_new_tokens=5)
    stream.close()
    with pytest.raises(GenerationError, match="has gone on since this message was sent"):
        next(late)
    chat.send("Who is Anne?", max_new_tokens=5)
    assert [message["content"] for message in chat.messages[::2]] == ["Who is Emma?", "Who is Anne?"]
