"""The KV cache on a device; sampler.py has the mask, the logits and the draw there.

Dimensions as in host.py, but T is the capacity: buffers, mask and token ids keep their addresses from step to step.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue, RunOptions

from phimoe_onnx.bundle import ATTENTION_MASK, CACHE_WIDTHS, INPUT_IDS, LOGITS, cache_names
from phimoe_onnx.errors import OutOfMemoryError
from phimoe_onnx.runtime.ort.errors import REMEDY, gigabytes
from phimoe_onnx.runtime.sampling import Choice
from phimoe_onnx.runtime.slots.base import free_place, round_up, scalars
from phimoe_onnx.runtime.slots.sampler import DeviceSampler

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

    from phimoe_onnx.bundle import Decoding

_NO_GRAPH = -1  # ONNX Runtime's number for a run that is neither recorded nor replayed
_graph_ids = itertools.count(1)
_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3, "uint8": 2}  # ONNX's numbers: numpy has no bfloat16


class DeviceCache:
    """As `host.SharedCache`, with everything on the device.

    A slot keeps its place in the buffers; one that is released, parked or in its prefill leaves a hole in a step, which
    computes along for nothing and writes one position behind what it holds: moving a slot would copy its whole cache.
    A step ends at the last place that takes part.

    With `capture` a step over all places is recorded as a CUDA graph the first time and replayed afterwards, by the
    thread that recorded it; the session must have the provider option enable_cuda_graph. The capacity is then a power
    of two, so that few are recorded.

    Raises:
        OutOfMemoryError: the buffers would take more than `limit` bytes; from `resize`, too.

    """

    def __init__(
        self,
        session: InferenceSession,
        sampling: InferenceSession,
        decoding: Decoding,
        device: str,
        slots: int,
        capacity: int,
        limit: int | None = None,
        capture: bool = False,
    ) -> None:
        self._session = session
        self._sampling = sampling
        self._device = device
        self._cache = decoding.cache
        self._vocab_size = decoding.vocab_size
        self._context = decoding.context
        self._limit = limit
        self._capture = capture
        self._past = cache_names(decoding.cache.num_hidden_layers, "past_key_values")
        self._present = cache_names(decoding.cache.num_hidden_layers, "present")
        self._places: dict[int, int] = {}  # of each slot, in the buffers
        self._used: dict[int, int] = {}  # the tokens that each slot has written
        self._buffers: list[OrtValue] = []
        self._last = scalars(1, 0)
        self.sampler: DeviceSampler
        self.resize(slots, capacity)

    def run_row(self, slot: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> NDArray[np.float32]:
        """See `Cache`."""
        if slot not in self._places:
            self._places[slot] = free_place(self._places.values())
        self._used[slot] = past + len(ids)
        self.sampler.touch()
        binding = self._bind(self._places[slot], 1)
        arrays = {INPUT_IDS: np.array([ids], np.int64), ATTENTION_MASK: np.ones((1, past + len(ids)), np.int64)}
        inputs = scalars(keep, rope_length)
        inputs.update((name, OrtValue.ortvalue_from_numpy(array)) for name, array in arrays.items())
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        logits = np.empty((0 if keep == 1 else len(ids), self._vocab_size), np.float32)
        if keep == 1:
            self.sampler.bind_logits(binding, self._places[slot])
        else:
            binding.bind_output(LOGITS, "cpu", 0, np.float32, [1, *logits.shape], logits.ctypes.data)
        self._session.run_with_iobinding(binding, _run_options(_NO_GRAPH))
        return logits

    def run_step(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """See `Cache`."""
        places = self._places
        self._used.update({slot: lengths[slot] + 1 for slot in tokens})
        self.sampler.prepare(
            {places[slot]: token for slot, token in tokens.items()},
            {places[slot]: length for slot, length in lengths.items()},
            self._others(tokens),
        )
        rows = self._rows(tokens)
        if rows not in self._steps:
            self._steps[rows] = binding = self._bind(0, rows)
            self.sampler.bind_step(binding, rows)
            for name, value in self._last.items():
                binding.bind_ortvalue_input(name, value)
        self._session.run_with_iobinding(self._steps[rows], self._step_options)

    def choose(self, choices: Mapping[int, Choice], lengths: Mapping[int, int]) -> dict[int, int | Exception]:
        """See `Cache`."""
        slots = {self._places[slot]: slot for slot in choices}
        chosen = self.sampler.choose(
            {self._places[slot]: choice for slot, choice in choices.items()},
            {self._places[slot]: lengths[slot] for slot in choices},
            self._others(choices),
            self._rows(choices),
        )
        return {slots[place]: token for place, token in chosen.items()}

    def last_logits(self, slots: Collection[int]) -> dict[int, NDArray[np.float32]]:
        """See `Cache`."""
        logits = self.sampler.logits()
        return {slot: logits[self._places[slot]] for slot in slots}

    def clear(self) -> None:
        """Forgets every slot; the cache is as new, its buffers where they were."""
        self._places, self._used = {}, {}
        self.sampler.clear()

    def release(self, slot: int) -> None:
        """See `Cache`."""
        self._places.pop(slot, None)
        self._used.pop(slot, None)
        self.sampler.touch()

    def resize(self, slots: int, capacity: int) -> None:
        """See `Cache`; what is held goes by way of the host's memory."""
        capacity = max(256, 1 << (capacity - 1).bit_length()) if self._capture else round_up(capacity)
        capacity = min(capacity, self._context)  # rope tables have a row for each token of the context
        needed = slots * capacity * self._cache.bytes_per_token
        if self._limit is not None and needed > self._limit:
            what = f"a cache of {slots} x {capacity} tokens"
            raise OutOfMemoryError(
                f"{what} takes {gigabytes(needed)}, memory_limit leaves {gigabytes(self._limit)} for it; {REMEDY}"
            )
        shape = [slots, self._cache.num_key_value_heads, capacity, self._cache.head_dim]
        # as float16 where it is bfloat16, which numpy cannot read: the bits are bound by their address under their own
        # type
        element = _TYPES["float16" if self._cache.dtype == "bfloat16" else self._cache.dtype]
        buffers = [OrtValue.ortvalue_from_shape_and_type(shape, element, self._device, 0) for _ in self._past]
        sampler = DeviceSampler(self._sampling, self._device, slots, capacity, self._vocab_size)
        places = {slot: place for place, slot in enumerate(sorted(self._places, key=self._places.__getitem__))}
        # what lay behind the slot's tokens may go
        self._used = {slot: min(used, capacity) for slot, used in self._used.items()}
        if places:
            sampler.inherit(self.sampler, {self._places[slot]: place for slot, place in places.items()})
            for before, after in zip(self._buffers, buffers, strict=True):
                values = before.numpy()
                larger = np.zeros(shape, values.dtype)
                for slot, place in places.items():
                    held = slice(self._used[slot])
                    larger[place, :, held] = values[self._places[slot], :, held]
                after.update_inplace(larger)
        self.slots, self.capacity = slots, capacity
        self._buffers, self._places, self.sampler = buffers, places, sampler
        self._steps: dict[int, IOBinding] = {}  # by the places that they run
        self._step_options = _run_options(next(_graph_ids) if self._capture else _NO_GRAPH)

    def _rows(self, slots: Mapping[int, object]) -> int:
        """How many places run, so that these slots do; all of them, always, where a step is recorded."""
        return self.slots if self._capture else 1 + max(self._places[slot] for slot in slots)

    def _others(self, slots: Mapping[int, object]) -> dict[int, int]:
        """By place, the tokens written by every slot but these."""
        return {self._places[slot]: used for slot, used in self._used.items() if slot not in slots}

    def _bind(self, first: int, rows: int) -> IOBinding:
        """A binding of `rows` places from `first` on, of every buffer, as past and as present."""
        binding = self._session.io_binding()
        shape = [rows, self._cache.num_key_value_heads, self.capacity, self._cache.head_dim]
        offset = first * int(np.prod(shape[1:])) * CACHE_WIDTHS[self._cache.dtype]
        element = _TYPES[self._cache.dtype]
        for past, present, buffer in zip(self._past, self._present, self._buffers, strict=True):
            address = buffer.data_ptr() + offset
            binding.bind_input(past, self._device, 0, element, shape, address)
            binding.bind_output(present, self._device, 0, element, shape, address)
        return binding


def _run_options(graph_id: int) -> RunOptions:
    options = RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
