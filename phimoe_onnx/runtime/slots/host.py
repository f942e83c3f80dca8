"""The KV cache on the CPU, and one pass of the graph over it: in one fixed buffer per layer and part, or growing.

Dimensions: B rows, S new tokens, P cached tokens, T = P + S, K num_key_value_heads, D head_dim, V vocab_size. base.py
says what a cache does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS, LOGITS, cache_names
from phimoe_onnx.runtime.sampling import Choice, sample_rows
from phimoe_onnx.runtime.slots.base import free_place, round_up, scalars

if TYPE_CHECKING:
    from onnxruntime import IOBinding

    from phimoe_onnx.bundle import Decoding
    from phimoe_onnx.runtime.ort.threads import Sessions


class SharedCache:
    """One buffer [slots, K, capacity, D] per layer and part that is past and present at once; GroupQueryAttention
    writes in place.

    The kernel takes several new tokens over a past for one row only, so a prefill runs each slot alone, over the slice
    of the buffers that is its own memory; a step runs all its slots together, over the slice that they fill without a
    gap. Where they have one, a slot's bytes move to another place. With the small model in int4, one thread, and 300
    tokens a row, a move costs 0.02 ms once, and a gap, whose row would compute along, 0.13 ms in each step of eight.
    """

    def __init__(self, sessions: Sessions, decoding: Decoding, slots: int, capacity: int) -> None:
        self._sessions = sessions
        self._vocab_size = decoding.vocab_size
        self._dtype = np.dtype(decoding.cache.dtype)
        self._heads, self._width = decoding.cache.num_key_value_heads, decoding.cache.head_dim
        self._past = cache_names(decoding.cache.num_hidden_layers, "past_key_values")
        self._present = cache_names(decoding.cache.num_hidden_layers, "present")
        self._places: dict[int, int] = {}  # of each slot, in the buffers
        self._used: dict[int, int] = {}  # the tokens that each slot has written
        self._logits: dict[int, NDArray[np.float32]] = {}  # [V], of each slot's last token
        self._order: dict[int, None] = {}  # the slots of the last step, as they lie, for which `_step` is bound
        self._buffers: list[NDArray[np.generic]] = []
        self._step: IOBinding
        self._last = scalars(1, 0)
        self.resize(slots, capacity)

    def run_row(self, slot: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> NDArray[np.float32]:
        """See `Cache`."""
        if slot not in self._places:
            self._places[slot] = free_place(self._places.values())
        self._used[slot] = past + len(ids)
        binding = self._bind(self._places[slot], 1, len(ids))
        wanted = scalars(keep, rope_length)
        for name, value in wanted.items():
            binding.bind_ortvalue_input(name, value)
        mask = np.ones((1, past + len(ids)), np.int64)
        logits: NDArray[np.float32] = self._run(binding, np.array([ids], np.int64), mask, keep or len(ids))[0]
        self._logits[slot] = logits[-1]
        return logits

    def run_step(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """See `Cache`."""
        if tokens.keys() != self._order.keys():
            first = self._gather(tokens)
            self._order = dict.fromkeys(sorted(tokens, key=self._places.__getitem__))
            self._step = self._bind(first, len(tokens), len(tokens))
            for name, value in self._last.items():
                self._step.bind_ortvalue_input(name, value)
        total = [lengths[slot] + 1 for slot in self._order]
        self._used.update(zip(self._order, total, strict=True))
        mask = (np.arange(max(total)) < np.array(total)[:, None]).astype(np.int64)
        ids = np.array([[tokens[slot]] for slot in self._order], np.int64)
        logits = self._run(self._step, ids, mask, 1)
        self._logits.update(zip(self._order, logits[:, 0], strict=True))

    def choose(self, choices: Mapping[int, Choice], lengths: Mapping[int, int]) -> dict[int, int | Exception]:
        """See `Cache`."""
        return sample_rows(self._logits, choices)

    def last_logits(self, slots: Collection[int]) -> dict[int, NDArray[np.float32]]:
        """See `Cache`."""
        return {slot: self._logits[slot] for slot in slots}

    def release(self, slot: int) -> None:
        """See `Cache`."""
        for known in (self._places, self._used, self._logits):
            known.pop(slot, None)
        if slot in self._order:
            self._order = {}

    def resize(self, slots: int, capacity: int) -> None:
        """See `Cache`."""
        capacity = round_up(capacity)
        shape = (slots, self._heads, capacity, self._width)
        # Zeros, not empty: the pages of a long buffer then cost no memory before they are written. A layer's two in one
        # piece: NumPy asks the system for huge pages from 4 MB on.
        larger = [part for _ in self._past[::2] for part in np.zeros((2, *shape), self._dtype)]
        places = {slot: place for place, slot in enumerate(sorted(self._places, key=self._places.__getitem__))}
        for number, before in enumerate(self._buffers):
            for slot, place in places.items():
                self._used[slot] = min(self._used[slot], capacity)  # what lay behind the slot's tokens may go
                held = slice(self._used[slot])
                larger[number][place, :, held] = before[self._places[slot], :, held]
            self._buffers[number] = larger[number]  # one by one, so that the old ones go as the new ones fill
        self.slots, self.capacity = slots, capacity
        self._buffers, self._places = larger, places
        self._order = {}

    def _gather(self, slots: Mapping[int, int]) -> int:
        """Makes the slots lie side by side, where the fewest of them must move for it; returns the first place."""
        at = {place: slot for slot, place in self._places.items()}
        windows = [range(first, first + len(slots)) for first in range(self.slots - len(slots) + 1)]
        window = min(windows, key=lambda places: sum(at.get(place) not in slots for place in places))
        outside = [slot for slot in slots if self._places[slot] not in window]
        for place in window:
            if at.get(place) not in slots:
                self._swap(outside.pop(), place, at.get(place))
        return window.start

    def _swap(self, slot: int, place: int, other: int | None) -> None:
        """Moves a slot's bytes to another place, and those of the slot that has it, if any, to where they were."""
        before = self._places[slot]
        held = slice(max(self._used[slot], self._used.get(other, 0) if other is not None else 0))
        for buffer in self._buffers:
            kept = None if other is None else buffer[place, :, held].copy()
            buffer[place, :, held] = buffer[before, :, held]
            if kept is not None:
                buffer[before, :, held] = kept
        self._places[slot] = place
        if other is not None:
            self._places[other] = before

    def _bind(self, first: int, rows: int, tokens: int) -> IOBinding:
        """A binding of `rows` places from `first` on, of every buffer, as past and as present, for new `tokens`."""
        binding = self._sessions.of(tokens).io_binding()
        shape = [rows, self._heads, self.capacity, self._width]
        offset = first * int(np.prod(shape[1:])) * self._dtype.itemsize
        for past, present, buffer in zip(self._past, self._present, self._buffers, strict=True):
            address = buffer.ctypes.data + offset
            binding.bind_input(past, "cpu", 0, self._dtype, shape, address)
            binding.bind_output(present, "cpu", 0, self._dtype, shape, address)
        return binding

    def _run(
        self, binding: IOBinding, tokens: NDArray[np.int64], mask: NDArray[np.int64], kept: int
    ) -> NDArray[np.float32]:
        """The logits float32 [B, kept, V] of a pass over tokens [B, S] and a mask [B, T]."""
        # on the CPU an OrtValue is the array's memory
        binding.bind_ortvalue_input(INPUT_IDS, OrtValue.ortvalue_from_numpy(tokens))
        binding.bind_ortvalue_input(ATTENTION_MASK, OrtValue.ortvalue_from_numpy(mask))
        logits = np.empty((len(tokens), kept, self._vocab_size), np.float32)
        binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._sessions.of(tokens.size).run_with_iobinding(binding)
        return logits


class GrowingCache:
    """Each slot's own keys and values [1, K, P, D], which every pass replaces by [1, K, T, D]; for graphs of standard
    operators.
    """

    def __init__(self, sessions: Sessions, decoding: Decoding, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._sessions = sessions
        self._past = cache_names(decoding.cache.num_hidden_layers, "past_key_values")
        self._outputs = [LOGITS, *cache_names(decoding.cache.num_hidden_layers, "present")]
        shape = (1, decoding.cache.num_key_value_heads, 0, decoding.cache.head_dim)
        nothing = OrtValue.ortvalue_from_numpy(np.zeros(shape, np.dtype(decoding.cache.dtype)))
        self._nothing = [nothing] * len(self._past)
        self._cached: dict[int, list[OrtValue]] = {}
        self._logits: dict[int, NDArray[np.float32]] = {}  # [V], of each slot's last token

    def run_row(self, slot: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> NDArray[np.float32]:
        """See `Cache`."""
        cached = self._cached.get(slot, self._nothing)
        if cached[0].shape()[2] > past:
            cached = [
                OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :past])) for value in cached
            ]
        arrays = {
            INPUT_IDS: np.array([ids], np.int64),
            ATTENTION_MASK: np.ones((1, past + len(ids)), np.int64),
        }
        inputs = scalars(keep, rope_length)
        inputs.update((name, OrtValue.ortvalue_from_numpy(array)) for name, array in arrays.items())
        inputs.update(zip(self._past, cached, strict=True))
        logits, *self._cached[slot] = self._sessions.of(len(ids)).run_with_ort_values(self._outputs, inputs)
        found: NDArray[np.float32] = np.array(logits.numpy()[0])
        self._logits[slot] = found[-1]
        return found

    def run_step(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """See `Cache`; one slot after the other."""
        for slot, token in tokens.items():
            self.run_row(slot, [token], lengths[slot], 1, 0)

    def choose(self, choices: Mapping[int, Choice], lengths: Mapping[int, int]) -> dict[int, int | Exception]:
        """See `Cache`."""
        return sample_rows(self._logits, choices)

    def last_logits(self, slots: Collection[int]) -> dict[int, NDArray[np.float32]]:
        """See `Cache`."""
        return {slot: self._logits[slot] for slot in slots}

    def release(self, slot: int) -> None:
        """See `Cache`."""
        self._cached.pop(slot, None)
        self._logits.pop(slot, None)

    def resize(self, slots: int, capacity: int) -> None:
        """See `Cache`; there is no memory to be had in advance."""
        self.slots, self.capacity = slots, capacity
