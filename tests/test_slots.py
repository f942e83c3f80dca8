"""The three caches: whichever slots come, step, rest, move and leave, a slot's logits are those of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.exporter.sampling import sampling_graph
from phimoe_onnx.runtime.decoder import Decoders
from phimoe_onnx.runtime.ort.threads import Sessions
from phimoe_onnx.runtime.sampling import Choice, Sampling
from phimoe_onnx.runtime.slots.base import Cache
from phimoe_onnx.runtime.slots.device import DeviceCache
from phimoe_onnx.runtime.slots.host import GrowingCache, SharedCache
from tests.checkpoints import assert_close

Logits = NDArray[np.float32]


class Slots:
    """A cache and what its slots hold, with the logits that those tokens have alone."""

    def __init__(self, folder: Path, kind: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.sessions = Sessions(ort.InferenceSession(str(folder / "model.onnx"), options))
        self.decoding = read_manifest(folder).decoding
        sampler = ort.InferenceSession(ir.to_proto(sampling_graph()).SerializeToString(), options)
        self.cache: Cache = {
            "shared": lambda: SharedCache(self.sessions, self.decoding, 2, 8),
            "growing": lambda: GrowingCache(self.sessions, self.decoding, 2, 8),
            "device": lambda: DeviceCache(self.sessions.main, sampler, self.decoding, "cpu", 2, 8),
            "recorded": lambda: DeviceCache(self.sessions.main, sampler, self.decoding, "cpu", 2, 8, capture=True),
        }[kind]()
        self.tokens: dict[int, list[int]] = {}
        self.seen: dict[int, set[int]] = {}

    def check(self, slots: Sequence[int], penalty: float, look: bool) -> dict[int, int]:
        """The next tokens of slots that have logits, held to what is right; `look` also at the logits themselves."""
        found: dict[int, Logits] = {}

        def keep(slot: int) -> Callable[[Sequence[int], Logits], Logits]:
            return lambda _, logits: found.setdefault(slot, logits.copy())

        sampling = Sampling(repetition_penalty=penalty)
        choices = {slot: Choice(sampling, [], self.seen[slot], keep(slot) if look else None) for slot in slots}
        chosen = self.cache.choose(choices, {slot: len(self.tokens[slot]) for slot in slots})
        tokens: dict[int, int] = {}
        for slot, token in chosen.items():
            [*_, expected] = Decoders(self.sessions, self.decoding).open(1, 128).logits(self.tokens[slot])
            scores = expected[-1].copy()
            ids = sorted(self.seen[slot])
            scores[ids] = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
            assert isinstance(token, int)
            assert scores[token] >= scores.max() - 1e-3
            if look:
                assert_close(found[slot], expected[-1])
            self.seen[slot].add(token)
            tokens[slot] = token
        assert list(tokens) == list(slots)
        return tokens

    def prefill(self, slot: int, random: Random) -> None:
        """Some new tokens behind some of those that the slot holds."""
        held = self.tokens.setdefault(slot, [])
        del held[random.choice([random.randint(0, len(held)), len(held)]) :]  # a next turn keeps some, a chunk all
        ids = [random.randrange(3, self.decoding.vocab_size) for _ in range(random.randint(1, 6))]
        self.cache.run_row(slot, ids, len(held), 1, 0)
        held += ids
        self.seen[slot] = set(held)

    def step(self, tokens: dict[int, int]) -> None:
        """One new token of each of these slots."""
        self.cache.run_step(tokens, {slot: len(self.tokens[slot]) for slot in tokens})
        for slot, token in tokens.items():
            self.tokens[slot].append(token)
            self.seen[slot].add(token)


@pytest.mark.parametrize("kind", ["shared", "growing", "device", "recorded"])
@pytest.mark.parametrize("seed", range(4))
def test_a_slots_logits_are_those_of_its_tokens(bundle: Callable[..., Path], kind: str, seed: int) -> None:
    random = Random(seed)
    slots = Slots(bundle("plain", "cpu", "none"), kind)
    running: dict[int, int] = {}  # slots that step, with their next token; the others rest
    for _ in range(40):
        slots.cache.resize(max(2, len(slots.tokens) + random.choice([1, 1, 1, 2])), 70)
        ready = list(running)
        if running:
            slots.step(running)
        if len(slots.tokens) < 5 and random.random() < 0.5:
            resting = [slot for slot in range(6) if slot not in running]
            slot = random.choice(resting)
            slots.prefill(slot, random)
            if random.random() < 0.6:  # else it was a chunk, and more of the prompt is to come
                ready.append(slot)
        running = {}
        if ready:
            running = slots.check(ready, random.choice([1.0, 1.3]), random.random() < 0.3)
        for slot in list(running):
            if len(slots.tokens[slot]) > 60 or random.random() < 0.15:
                del running[slot]  # parked
                if random.random() < 0.6:
                    slots.cache.release(slot)
                    del slots.tokens[slot], slots.seen[slot]


@pytest.mark.parametrize("kind", ["shared", "growing", "device", "recorded"])
def test_a_number_that_comes_again_lies_elsewhere(bundle: Callable[..., Path], kind: str) -> None:
    slots, random = Slots(bundle("plain", "cpu", "none"), kind), Random(0)
    slots.cache.resize(3, 40)
    for slot in range(3):
        slots.prefill(slot, random)
    running = {slot: token for slot, token in slots.check(range(3), 1.0, True).items() if slot}
    slots.step(running)
    for slot in (0, 1):
        slots.cache.release(slot)
        del slots.tokens[slot]
    slots.prefill(1, random)
    slots.step(slots.check([1, 2], 1.0, True))
    slots.check([1, 2], 1.0, True)
