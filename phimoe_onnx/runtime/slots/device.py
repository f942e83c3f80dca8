"""The KV cache of a batch on a GPU, with its mask, logits and sampling: between two steps nothing but token ids leaves
the card.

Dimensions as in cache.py, but T is the capacity: buffers, mask and token ids keep their places and shapes from step to
step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue, RunOptions

from phimoe_onnx.bundle import ATTENTION_MASK, CACHE_WIDTHS, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, ROPE_LENGTH, cache_names
from phimoe_onnx.errors import GenerationError, OutOfMemoryError
from phimoe_onnx.runtime.ort.errors import REMEDY, gigabytes
from phimoe_onnx.runtime.sampling import Choice, Sampling, uniform

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

    from phimoe_onnx.bundle import Decoding

_NO_GRAPH = -1  # ONNX Runtime's number for a run that is neither recorded nor replayed
_graph_ids = itertools.count(1)
_IDLE = Choice(Sampling(), 0, ())
_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3, "uint8": 2}  # ONNX's numbers: numpy has no bfloat16


class DeviceCache:
    """As `cache.SharedCache`, with everything on the device.

    A row keeps its slot in the buffers to its end; `drop` leaves the slot idle, where it computes along for nothing:
    moving a row would copy its whole cache, and a change of shapes would cost more than the idle slot does.

    With `capture` a step is recorded as a CUDA graph the first time and replayed afterwards, by the thread that
    recorded it; the session must have the provider option enable_cuda_graph.

    Attributes:
        capacity: the tokens that a row has room for.

    Raises:
        OutOfMemoryError: the buffers would take more than `limit` bytes; from `reserve`, too.
    """

    def __init__(
        self,
        session: InferenceSession,
        sampling: InferenceSession,
        decoding: Decoding,
        device: str,
        rows: int,
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
        self._slots = list(range(rows))  # of each row
        self._count = rows  # slots, the idle ones too
        self._logits = self._place(np.zeros((rows, 1, decoding.vocab_size), np.float32))
        self._ids = self._place(np.zeros((rows, 1), np.int64))
        constants = {LOGITS_TO_KEEP: np.array([1], np.int64), ROPE_LENGTH: np.array([0], np.int64)}
        self._constants = {name: OrtValue.ortvalue_from_numpy(array) for name, array in constants.items()}
        self._seen = self._place(np.zeros((rows, decoding.vocab_size), np.bool_))
        self._counted: list[Any] = []  # the rows' `seen` that the device's holds, by identity
        self._step: IOBinding | None = None
        self._chosen: list[int] | None = None  # the rows' tokens that the device has chosen, and its mask counts
        self._allocate(capacity)

    def run_row(self, row: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> NDArray[np.float32]:
        """As `SharedCache.run_row`; with `keep` 1 the logits stay on the device and what is returned is empty."""
        slot = self._slots[row]
        binding = self._bind(slot, 1)
        inputs = {
            INPUT_IDS: np.array([ids], np.int64),
            ATTENTION_MASK: np.ones((1, past + len(ids)), np.int64),
            LOGITS_TO_KEEP: np.array([keep], np.int64),
            ROPE_LENGTH: np.array([rope_length], np.int64),
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        self._chosen = None
        logits = np.empty((0 if keep == 1 else len(ids), self._vocab_size), np.float32)
        if keep == 1:
            address = self._logits.data_ptr() + slot * self._vocab_size * 4
            binding.bind_output(LOGITS, self._device, 0, np.float32, [1, 1, self._vocab_size], address)
        else:
            binding.bind_output(LOGITS, "cpu", 0, np.float32, [1, *logits.shape], logits.ctypes.data)
        self._session.run_with_iobinding(binding, _run_options(_NO_GRAPH))
        return logits

    def choose(self, choices: Sequence[Choice], lengths: Sequence[int]) -> list[int]:
        """As `SharedCache.choose`, by the bundle's sampling graph, which also adds the tokens to the mask.

        Raises:
            GenerationError: logits are not finite.

        """
        if self._chosen is None:
            self._upload_mask(lengths)
        if any(choice.sampling.repetition_penalty != 1 for choice in choices):
            self._upload_seen(choices)
        binding = self._sampling.io_binding()
        for name, value in {LOGITS: self._logits, ATTENTION_MASK: self._mask, "seen": self._seen}.items():
            binding.bind_ortvalue_input(name, value)
        columns = self._columns(choices)
        for name, array in columns.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output(INPUT_IDS, self._ids)
        binding.bind_ortvalue_output(f"next_{ATTENTION_MASK}", self._mask)
        binding.bind_ortvalue_output("next_seen", self._seen)
        self._sampling.run_with_iobinding(binding)
        ids = self._ids.numpy()[:, 0]
        self._chosen = [int(ids[slot]) for slot in self._slots]
        if min(self._chosen) < 0:
            raise GenerationError("the graph's logits are not finite; check the bundle with phimoe-verify")
        return self._chosen

    def run_step(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """As `SharedCache.run_step`."""
        if self._chosen != list(ids):
            self._ids.update_inplace(self._spread(ids, 0))
            self._upload_mask([length + 1 for length in lengths])
        if self._step is None:
            self._step = self._bind(0, self._count)
            for name, value in {INPUT_IDS: self._ids, ATTENTION_MASK: self._mask, **self._constants}.items():
                self._step.bind_ortvalue_input(name, value)
            self._step.bind_ortvalue_output(LOGITS, self._logits)
        self._session.run_with_iobinding(self._step, self._step_options)
        self._chosen = self._chosen or list(ids)

    def clear(self) -> None:
        """Forgets every row; the cache is as new, its buffers where they were."""
        self._slots = list(range(self._count))
        self._chosen = None
        self._counted = []

    def drop(self, row: int) -> None:
        """Forgets a row; the last row takes its number."""
        self._slots[row] = self._slots[-1]
        self._slots.pop()
        self._chosen = None

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row, keeping what is cached, by way of the host's memory."""
        if capacity <= self.capacity:
            return
        before, kept = self.capacity, [buffer.numpy() for buffer in self._buffers]
        self._allocate(capacity)
        for buffer, values in zip(self._buffers, kept, strict=True):
            larger = np.zeros((*values.shape[:2], self.capacity, values.shape[3]), values.dtype)
            larger[:, :, :before] = values
            buffer.update_inplace(larger)

    def _allocate(self, capacity: int) -> None:
        capacity = min(-(-capacity // 256) * 256, self._context)  # rope tables have a row for each token of the context
        needed = self._count * capacity * self._cache.bytes_per_token
        if self._limit is not None and needed > self._limit:
            what = f"a cache of {self._count} x {capacity} tokens"
            raise OutOfMemoryError(
                f"{what} takes {gigabytes(needed)}, memory_limit leaves {gigabytes(self._limit)} for it; {REMEDY}"
            )
        self.capacity = capacity
        shape = [self._count, self._cache.num_key_value_heads, capacity, self._cache.head_dim]
        # as float16 where it is bfloat16, which numpy cannot read: the bits are bound by their address under their own
        # type
        element = _TYPES["float16" if self._cache.dtype == "bfloat16" else self._cache.dtype]
        self._buffers = [OrtValue.ortvalue_from_shape_and_type(shape, element, self._device, 0) for _ in self._past]
        self._mask = self._place(np.zeros((self._count, self.capacity), np.int64))
        self._step = self._chosen = None
        self._step_options = _run_options(
            next(_graph_ids) if self._capture else _NO_GRAPH
        )  # new places, so a new graph

    def _bind(self, first: int, slots: int) -> IOBinding:
        """A binding of slots first .. first + slots of every buffer as past and as present."""
        binding = self._session.io_binding()
        shape = [slots, self._cache.num_key_value_heads, self.capacity, self._cache.head_dim]
        offset = first * int(np.prod(shape[1:])) * CACHE_WIDTHS[self._cache.dtype]
        element = _TYPES[self._cache.dtype]
        for past, present, buffer in zip(self._past, self._present, self._buffers, strict=True):
            address = buffer.data_ptr() + offset
            binding.bind_input(past, self._device, 0, element, shape, address)
            binding.bind_output(present, self._device, 0, element, shape, address)
        return binding

    def _columns(self, choices: Sequence[Choice]) -> dict[str, NDArray[Any]]:
        """The sampling graph's inputs from the host."""
        slots = [_IDLE] * self._count
        for slot, choice in zip(self._slots, choices, strict=True):
            slots[slot] = choice
        options = [choice.sampling for choice in slots]
        columns: dict[str, NDArray[Any]] = {
            "greedy": np.array([all(choice.sampling.temperature == 0 for choice in choices)])
        }
        columns["repetition_penalty"] = np.array([[each.repetition_penalty] for each in options], np.float32)
        columns["temperature"] = np.array([[each.temperature or 1] for each in options], np.float64)
        columns["top_k"] = np.array(
            [[1 if each.temperature == 0 else each.top_k or self._vocab_size] for each in options], np.int64
        )
        columns["top_p"] = np.array([[each.top_p] for each in options], np.float64)
        columns["min_p"] = np.array([[each.min_p] for each in options], np.float64)
        columns["u"] = np.array([[uniform(choice.sampling.seed, choice.step)] for choice in slots], np.float64)
        return columns

    def _upload_mask(self, lengths: Sequence[int]) -> None:
        """The mask of rows that hold so many tokens; an idle slot has one."""
        self._mask.update_inplace((np.arange(self.capacity) < self._spread(lengths, 1)).astype(np.int64))

    def _upload_seen(self, choices: Sequence[Choice]) -> None:
        """The rows' tokens so far, unless the device has counted them along."""
        rows = [choice.seen for choice in choices]
        if (
            self._chosen is not None
            and len(rows) == len(self._counted)
            and all(map(lambda a, b: a is b, rows, self._counted))
        ):
            return
        seen = np.zeros((self._count, self._vocab_size), np.bool_)
        for slot, row in zip(self._slots, rows, strict=True):
            seen[slot, np.fromiter(row, np.int64, len(row))] = True
        self._seen.update_inplace(seen)
        self._counted = rows

    def _spread(self, rows: Sequence[int], idle: int) -> NDArray[np.int64]:
        """A column [slots, 1] of the rows' numbers, and `idle` where no row is."""
        column = np.full((self._count, 1), idle, np.int64)
        column[self._slots, 0] = rows
        return column

    def _place(self, array: NDArray[Any]) -> OrtValue:
        return OrtValue.ortvalue_from_numpy(array, self._device, 0)


def _run_options(graph_id: int) -> RunOptions:
    options = RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
