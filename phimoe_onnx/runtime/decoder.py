"""What the slots of a cache hold, and how they go on: a chunk of a prompt, a step of several slots, the next tokens."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from phimoe_onnx.bundle import Decoding
from phimoe_onnx.errors import GenerationError, OutOfMemoryError
from phimoe_onnx.runtime.ort.errors import memory_errors, run_errors
from phimoe_onnx.runtime.ort.threads import Sessions
from phimoe_onnx.runtime.sampling import Choice, sample_rows
from phimoe_onnx.runtime.slots.base import Cache
from phimoe_onnx.runtime.slots.device import DeviceCache
from phimoe_onnx.runtime.slots.host import GrowingCache, SharedCache


@dataclass(frozen=True)
class _Ahead:
    """Tokens that were run behind a slot's own, and what it needs where it takes them.

    Attributes:
        length: the tokens of the slot before them.
        ids: the tokens.
        logits: float32 [1 + ids, V], from those before the first of them on.

    """

    length: int
    ids: Sequence[int]
    logits: NDArray[np.float32]


class Decoder:
    """The tokens that each slot has in its cache; longrope's change of factors is handled here and nowhere above.

    A sequence that passes `rope_boundary` rotates every position by other factors, so its cached keys are then worth
    nothing and the slot is prefilled again. V below is vocab_size.

    A slot may run tokens ahead of those that it holds: they lie in the cache and count once they are taken, one by one.
    Whatever else the slot runs is written over them.

    Attributes:
        tokens: by slot, the ids whose keys and values are cached.
        chunk: how many tokens of a prompt run at once.

    """

    def __init__(self, cache: Cache, decoding: Decoding) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.chunk = decoding.prefill_chunk
        self._vocab_size = decoding.vocab_size
        self._cache = cache
        self._bytes_per_token = decoding.cache.bytes_per_token
        self._boundary = decoding.rope_boundary
        self._ahead: dict[int, _Ahead] = {}
        self._long: dict[int, bool] = {}  # whether the slot's keys were rotated by the long factors
        self._plans: dict[
            int, tuple[Sequence[int], int]
        ] = {}  # the ids that the slot is to hold, and their rope_length

    def begin(self, slot: int, ids: Sequence[int]) -> None:
        """Makes the slot keep the longest prefix of `ids` that it holds, and plans the rest, for `run_chunk`.

        Raises:
            GenerationError: an id is outside the vocabulary.

        """
        self._check(ids)
        held = self.tokens.setdefault(slot, [])
        reusable = 0
        if self._long.get(slot) == self._is_long(len(ids)):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(held, ids, strict=False))
            reusable = min(sum(1 for _ in same), len(ids) - 1)  # the last token always runs: its logits are wanted
        del held[reusable:]
        self._plan(slot, ids, len(ids))

    def crosses(self, slot: int) -> bool:
        """Whether the slot's next token is the first beyond the boundary: `renew` it then, before its step."""
        return self._is_long(len(self.tokens[slot]) + 1) != self._long[slot]

    def renew(self, slot: int) -> None:
        """Plans all tokens that the slot holds once more, rotated as the next one will be."""
        ids = self.tokens[slot]
        self._plans[slot] = (ids, len(ids) + 1)  # in an order in which Ctrl-C loses no token
        self.tokens[slot] = []
        self._long[slot] = self._is_long(len(ids) + 1)

    def next_chunk(self, slot: int) -> int:
        """How many tokens `run_chunk` would run; 0 where nothing is planned."""
        if slot not in self._plans:
            return 0
        return max(0, min(self.chunk, len(self._plans[slot][0]) - len(self.tokens[slot])))

    def run_chunk(self, slot: int) -> None:
        """Runs the next chunk of what is planned; after the last one the slot has logits."""
        self._run_chunk(slot, 1)

    def prefill(self, slot: int, ids: Sequence[int]) -> None:
        """Makes the slot hold `ids` at once."""
        self.begin(slot, ids)
        while self.next_chunk(slot):
            self.run_chunk(slot)

    def choose(self, choices: Mapping[int, Choice]) -> dict[int, int | Exception]:
        """The token that follows each slot's last one, or the error that kept it from having one: `Cache.choose`."""
        ahead = self._logits_ahead(choices)
        others = {slot: choice for slot, choice in choices.items() if slot not in ahead}
        chosen = sample_rows(ahead, {slot: choices[slot] for slot in ahead})
        if others:
            chosen |= self._cache.choose(others, {slot: len(self.tokens[slot]) for slot in others})
        return chosen

    def last_logits(self, slots: Collection[int]) -> dict[int, NDArray[np.float32]]:
        """The logits [V] that `choose` chooses by, or has chosen by."""
        ahead = self._logits_ahead(slots)
        others = [slot for slot in slots if slot not in ahead]
        return ahead | (self._cache.last_logits(others) if others else {})

    def step(self, tokens: Mapping[int, int]) -> dict[int, Exception]:
        """Appends one token to each slot of `tokens`.

        Returns:
            The errors of the slots that it could not be appended to. Where the step fails as a whole, each slot is
            run alone, so that only those have an error that fail by themselves.

        Raises:
            GenerationError: an id is outside the vocabulary.

        """
        self._check(tokens.values())
        self.drop_ahead(tokens)
        lengths = {slot: len(self.tokens[slot]) for slot in tokens}
        failed: dict[int, Exception] = {}
        try:
            cached = sum(lengths.values())
            with run_errors(f"a step of {len(tokens)} rows, {cached} tokens cached", cached * self._bytes_per_token):
                self._cache.run_step(tokens, lengths)
        except Exception as error:  # ONNX Runtime's exceptions have no common base below this
            failed = self._step_alone(tokens, lengths) if len(tokens) > 1 else dict.fromkeys(tokens, error)
        for slot, token in tokens.items():
            if slot not in failed:
                self.tokens[slot].append(token)
        return failed

    def room_ahead(self, slot: int) -> int:
        """How many tokens the slot may run ahead of its next one: as many as its place, a pass and longrope allow."""
        length = len(self.tokens[slot]) + 1
        room = min(self._cache.capacity - length, self.chunk - 1)
        if self._boundary is not None and not self._long[slot]:
            room = min(room, self._boundary - length)
        return room

    def run_ahead(self, slot: int, token: int, ids: Sequence[int]) -> None:
        """Appends a token as `step` does, and runs `ids`, up to `room_ahead`, ahead; not on a device.

        Raises:
            Exception: there is no memory for it, for example; the slot holds what it held.

        """
        held = self.tokens[slot]
        with run_errors(f"{1 + len(ids)} tokens after {len(held)}", len(held) * self._bytes_per_token):
            logits = self._cache.run_row(slot, [token, *ids], len(held), 1 + len(ids), 0)
        self._ahead[slot] = _Ahead(len(held) + 1, ids, logits)
        held.append(token)

    def take_ahead(self, slot: int, token: int) -> bool:
        """Appends a token if it is the next one that was run ahead; else what was is forgotten."""
        if slot not in self._ahead:
            return False
        ahead, held = self._ahead[slot], self.tokens[slot]
        taken = len(held) - ahead.length
        if taken < len(ahead.ids) and ahead.ids[taken] == token:
            held.append(token)
            return True
        self.drop_ahead([slot])
        return False

    def drop_ahead(self, slots: Iterable[int]) -> None:
        """Forgets what these slots have run ahead."""
        for slot in slots:
            self._ahead.pop(slot, None)

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """In slot 0, from nothing: the logits after each token, in order, in pieces float32 [up to `chunk`, V]."""
        self._check(ids)
        self.tokens[0] = []
        self._plan(0, ids, len(ids))
        while self.next_chunk(0):
            yield self._run_chunk(0, 0)

    def release(self, slot: int) -> None:
        """Forgets a slot."""
        self.drop_ahead([slot])
        for known in (self.tokens, self._long, self._plans):
            known.pop(slot, None)
        self._cache.release(slot)

    def reserve(self, more: int, capacity: int, most: int) -> None:
        """Makes room for so many slots more, `most` in all, and for `capacity` tokens in each, if there is less.

        Raises:
            OutOfMemoryError: there is no memory for it; nothing has changed then.

        """
        slots = max(len(self.tokens) + more, self._cache.slots)
        capacity = max(capacity, self._cache.capacity)
        if slots > self._cache.slots:
            with suppress(OutOfMemoryError):  # twice as many at once, so that rows that come one by one move seldom
                self._resize(max(slots, min(2 * self._cache.slots, most)), capacity)
        if slots > self._cache.slots or capacity > self._cache.capacity:
            self._resize(slots, capacity)

    def trim(self) -> None:
        """Gives back what several rows needed, where few of them are left."""
        if self._cache.slots > 2 * len(self.tokens):
            with suppress(OutOfMemoryError):  # old and new are there at once
                self._resize(len(self.tokens), 1 + max(map(len, self.tokens.values())))

    def _logits_ahead(self, slots: Iterable[int]) -> dict[int, NDArray[np.float32]]:
        """The logits [V] after the last token of those slots that have run any ahead."""
        known = {slot: self._ahead[slot] for slot in slots if slot in self._ahead}
        return {slot: ahead.logits[len(self.tokens[slot]) - ahead.length] for slot, ahead in known.items()}

    def _resize(self, slots: int, capacity: int) -> None:
        with memory_errors(f"a cache of {slots} x {capacity} tokens", slots * capacity * self._bytes_per_token):
            self._cache.resize(slots, capacity)

    def _plan(self, slot: int, ids: Sequence[int], rope_length: int) -> None:
        self._long[slot] = self._is_long(rope_length)
        self._plans[slot] = (ids, rope_length)

    def _run_chunk(self, slot: int, keep: int) -> NDArray[np.float32]:
        """Runs one chunk; the logits float32 [keep or the chunk's length, V] where the cache gives them."""
        self.drop_ahead([slot])
        (ids, rope_length), held = self._plans[slot], self.tokens[slot]
        chunk = ids[len(held) : len(held) + self.chunk]
        with run_errors(f"{len(chunk)} of a prompt's {len(ids)} tokens", len(ids) * self._bytes_per_token):
            logits = self._cache.run_row(slot, chunk, len(held), keep, rope_length)
        held.extend(chunk)
        if len(held) == len(ids):
            del self._plans[slot]
        return logits

    def _step_alone(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> dict[int, Exception]:
        """The errors of the slots that cannot be run alone either."""
        failed: dict[int, Exception] = {}
        for slot, token in tokens.items():
            try:
                with run_errors(f"a step, {lengths[slot]} tokens cached", lengths[slot] * self._bytes_per_token):
                    self._cache.run_row(slot, [token], lengths[slot], 1, 0)
            except Exception as error:  # as in `step`
                failed[slot] = error
        return failed

    def _check(self, ids: Collection[int]) -> None:
        """A graph that gathers quantised rows has numbers for any id at all."""
        for id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= id < self._vocab_size:
                raise GenerationError(f"{id} is no token id, expected 0 to {self._vocab_size - 1}")

    def _is_long(self, length: int) -> bool:
        return self._boundary is not None and length > self._boundary


@dataclass
class Decoders:
    """Opens decoders over a bundle's graphs.

    Attributes:
        sessions: over the bundle's graph.
        decoding: the manifest's section about it.
        device: where it runs.
        sampling: the sampling graph, where rows stay on a device; else None.
        limit: the bytes that one cache may take on a device; None is all.
        idle: with CUDA graphs, the caches that no decoder uses, by slots and capacity: recorded steps read fixed
            places, so a cache is used again. None without.

    """

    sessions: Sessions
    decoding: Decoding
    device: str = "cpu"
    sampling: InferenceSession | None = None
    limit: int | None = None
    idle: dict[tuple[int, int], DeviceCache] | None = None

    def open(self, slots: int, capacity: int) -> Decoder:
        """A decoder of `slots` empty slots of up to `capacity` tokens.

        Raises:
            OutOfMemoryError: there is no memory for so many.

        """
        needed = slots * capacity * self.decoding.cache.bytes_per_token
        with memory_errors(f"a cache of {slots} x {capacity} tokens", needed):
            cache = self._cache(slots, capacity)
        decoder = Decoder(cache, self.decoding)
        if self.idle is not None and isinstance(cache, DeviceCache):
            weakref.finalize(decoder, _shelve, self.idle, cache).atexit = False
        return decoder

    def _cache(self, slots: int, capacity: int) -> Cache:
        if self.sampling is None:
            host = SharedCache if self.decoding.cache.shared else GrowingCache
            return host(self.sessions, self.decoding, slots, capacity)
        fits = [key for key in self.idle or {} if key[0] == slots and key[1] >= capacity]
        if self.idle and fits:
            cache = self.idle.pop(min(fits))
            cache.clear()
            return cache
        capture = self.idle is not None
        return DeviceCache(
            self.sessions.main, self.sampling, self.decoding, self.device, slots, capacity, self.limit, capture
        )


def _shelve(idle: dict[tuple[int, int], DeviceCache], cache: DeviceCache) -> None:
    idle[cache.slots, cache.capacity] = cache
