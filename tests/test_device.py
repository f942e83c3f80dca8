"""The cache that lives on a device, run on the CPU: CUDA's graphs, bindings, mask and sampling graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from phimoe_onnx.bundle import LOGITS, SAMPLING, read_manifest
from phimoe_onnx.errors import GenerationError, OutOfMemoryError
from phimoe_onnx.runtime.decoder import Decoder, Decoders
from phimoe_onnx.runtime.engine import Engine
from phimoe_onnx.runtime.generate import generate
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.runtime.ort import threads
from phimoe_onnx.runtime.request import make_request
from phimoe_onnx.runtime.sampling import Choice, Sampling
from phimoe_onnx.runtime.slots import device
from phimoe_onnx.runtime.slots.device import DeviceCache
from phimoe_onnx.text.template import ChatTemplate
from phimoe_onnx.text.tokenizer import Tokenizer

Bundle = Callable[..., Path]
Make = Callable[[int, int], Decoder]
GREEDY = Choice(Sampling(), (), ())


class Sessions:
    """A CUDA bundle's two graphs on the CPU provider."""

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.decoding = read_manifest(folder).decoding
        self.model = ort.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self.sampling = ort.InferenceSession(str(folder / SAMPLING), options, ["CPUExecutionProvider"])
        self.folder = folder
        self.tokenizer = Tokenizer(folder, self.decoding.hidden_tokens.values())

    def device(self, slots: int, capacity: int) -> Decoder:
        """Slots in the cache that is under test."""
        return Decoders(threads.Sessions(self.model), self.decoding, sampling=self.sampling).open(slots, capacity)

    def host(self, slots: int, capacity: int) -> Decoder:
        """Slots in the CPU's cache, over the same graph."""
        return Decoders(threads.Sessions(self.model), self.decoding).open(slots, capacity)

    def load(self, **options: Any) -> PhiMoE:
        """The bundle as it would be on a device; end tokens do not end its texts."""
        template = ChatTemplate(self.folder)
        sessions = threads.Sessions(self.model)
        model = PhiMoE(sessions, read_manifest(self.folder), self.tokenizer, template, "cpu", self.sampling, **options)
        model.eos = frozenset()
        return model

    def write(self, make: Make, prompts: Sequence[list[int]], lengths: list[int], **options: Any) -> list[list[int]]:
        """The new tokens of each prompt."""
        rows = zip(prompts, lengths, strict=True)
        requests = [
            make_request(prompt, self.decoding.context, max_new_tokens=length, **options) for prompt, length in rows
        ]
        found: list[list[int]] = [[] for _ in prompts]
        for piece in generate(Engine(make, self.tokenizer), requests):
            found[piece.row].append(piece.token_id)
        return found


@pytest.fixture(
    scope="module",
    params=[("tiles", "int4"), ("tiles-xqa", "int8"), ("longrope", "none"), ("window", "none")],
    ids="-".join,
)
def sessions(bundle: Bundle, request: pytest.FixtureRequest) -> Sessions:
    shape, quantize = request.param
    return Sessions(bundle(shape, "cuda", quantize))


def prompts(vocab_size: int, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(sum(lengths))
    return [random.integers(3, vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.4}, {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 5}], ids=str
)
def test_rows_of_uneven_length_write_as_on_the_host(sessions: Sessions, options: dict[str, Any]) -> None:
    # the first row ends first, the last one moves up
    rows, lengths = (
        prompts(sessions.decoding.vocab_size, 3, 30, 11),
        [12, 30, 20],
    )
    assert sessions.write(sessions.device, rows, lengths, **options) == sessions.write(
        sessions.host, rows, lengths, **options
    )


def test_a_cache_that_grows_keeps_what_it_holds(sessions: Sessions) -> None:
    [prompt] = prompts(sessions.decoding.vocab_size, 20)
    found = []
    for decoder in (sessions.device(1, 1), sessions.host(1, 1)):
        decoder.prefill(0, prompt)
        decoder.reserve(2, sessions.decoding.context, 3)
        tokens = [decoder.choose({0: GREEDY})[0]]
        for _ in range(10):
            assert isinstance(tokens[-1], int)
            assert decoder.step({0: tokens[-1]}) == {}
            tokens.append(decoder.choose({0: GREEDY})[0])
        decoder.prefill(0, [*prompt, *tokens[:3], 7])  # another turn, over the prefix that is held
        found.append([*tokens, decoder.choose({0: GREEDY})[0]])
    assert found[0] == found[1]


def test_a_cache_that_shrinks_lets_go_what_lay_behind(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot has written more tokens than it still counts, as after an answer that was cancelled."""
    monkeypatch.setattr(device, "round_up", lambda tokens: tokens)
    [prompt] = prompts(sessions.decoding.vocab_size, 20)
    found = []
    for shrinks in (True, False):
        cache = DeviceCache(sessions.model, sessions.sampling, sessions.decoding, "cpu", 1, 24)
        cache.run_row(0, prompt, 0, 1, 0)
        if shrinks:
            cache.resize(1, 8)
            assert cache.capacity == 8
        cache.run_row(0, prompt[4:8], 4, 1, 0)
        found.append(cache.choose({0: GREEDY}, {0: 8}))
    assert found[0] == found[1]


def test_all_logits_come_to_the_host(sessions: Sessions) -> None:
    [prompt] = prompts(sessions.decoding.vocab_size, 40)
    ours, theirs = (
        np.concatenate(list(decoder.logits(prompt))) for decoder in (sessions.device(1, 40), sessions.host(1, 40))
    )
    assert ours.shape == (40, sessions.decoding.vocab_size)
    assert np.array_equal(ours, theirs)


def test_nonsense_is_an_error_of_its_own_slot(sessions: Sessions) -> None:
    cache = DeviceCache(sessions.model, sessions.sampling, sessions.decoding, "cpu", 2, 8)
    cache.run_row(0, [5], 0, 1, 0)
    cache.run_row(1, [5], 0, 1, 0)
    expected = cache.choose({0: GREEDY, 1: GREEDY}, {0: 1, 1: 1})
    logits = cache.sampler._values[LOGITS]
    logits.update_inplace(logits.numpy() * np.array([[[1]], [[np.nan]]], np.float32))
    chosen = cache.choose({0: GREEDY, 1: GREEDY}, {0: 1, 1: 1})
    assert chosen[0] == expected[0]
    assert isinstance(chosen[1], GenerationError)
    assert "not finite" in str(chosen[1])


def test_a_cache_over_its_limit_is_refused_before_it_is_made(sessions: Sessions) -> None:
    capacity = min(256, sessions.decoding.context)  # buffers grow by 256 tokens
    limit = 2 * capacity * sessions.decoding.cache.bytes_per_token

    def make(rows: int) -> None:
        DeviceCache(sessions.model, sessions.sampling, sessions.decoding, "cpu", rows, 8, limit)

    make(2)
    with pytest.raises(OutOfMemoryError, match=rf"a cache of 3 x {capacity} tokens takes .* memory_limit leaves"):
        make(3)


def test_with_cuda_graphs_a_cache_serves_again_and_forgets(sessions: Sessions) -> None:
    model = sessions.load(cuda_graphs=True)
    rows = prompts(sessions.decoding.vocab_size, 3, 30)
    expected = [sessions.write(sessions.host, [row], [9])[0] for row in rows]
    assert [model.generate(row, max_new_tokens=9).token_ids for row in rows] == expected
    assert list(model._decoders.idle or {}) == [(1, min(256, sessions.decoding.context))]
    assert [result.token_ids for result in model.generate(rows, max_new_tokens=9)] == expected
    assert {slots for slots, _ in model._decoders.idle or {}} == {1, 2}


def test_logprobs_are_the_hosts_and_change_no_token(sessions: Sessions) -> None:
    rows = prompts(sessions.decoding.vocab_size, 3, 30, 11)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "seed": 5, "repetition_penalty": 1.2}
    model, host = sessions.load(), sessions.load()
    host._decoders.sampling = None  # its caches are the CPU's then
    without = model.generate(rows, **options)
    for before, found, right in zip(
        without, model.generate(rows, logprobs=3, **options), host.generate(rows, logprobs=3, **options), strict=True
    ):
        assert before.token_ids == found.token_ids == right.token_ids
        assert found.logprobs
        assert right.logprobs
        for ours, theirs in zip(found.logprobs, right.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert [each.logprob for each in ours.top] == pytest.approx([each.logprob for each in theirs.top], abs=1e-3)
