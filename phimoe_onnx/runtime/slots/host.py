"""The KV cache of a batch on the CPU, and one pass of the graph over it: in one fixed buffer per layer and part, or
growing.

Dimensions: B rows, S new tokens, P cached tokens, T = P + S, K num_key_value_heads, D head_dim, V vocab_size. Both
classes and device.py's answer the same calls; decoder.py says which tokens a row holds, these only where keys, values
and logits lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, ROPE_LENGTH, cache_names
from phimoe_onnx.runtime.sampling import Choice, sample_rows

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

    from phimoe_onnx.bundle import Decoding


class SharedCache:
    """One buffer [B, K, capacity, D] per layer and part that is past and present at once; GroupQueryAttention writes in
    place.

    The kernel takes several new tokens over a past for one row only, so a prefill runs each row alone, on the slice of
    the buffers that is the row's own memory; a step runs all rows together.
    """

    def __init__(self, session: InferenceSession, decoding: Decoding, rows: int, capacity: int) -> None:
        self._session = session
        self._vocab_size = decoding.vocab_size
        self._dtype = np.dtype(decoding.cache.dtype)
        self._past = cache_names(decoding.cache.num_hidden_layers, "past_key_values")
        self._present = cache_names(decoding.cache.num_hidden_layers, "present")
        shape = (rows, decoding.cache.num_key_value_heads, _round_up(capacity), decoding.cache.head_dim)
        # zeros, not empty: the pages of a long buffer then cost no memory before they are written
        self._buffers = [np.zeros(shape, self._dtype) for _ in self._past]
        self._shape = shape
        self._logits = [np.empty(0, np.float32)] * rows
        self._step: IOBinding | None = None

    def run_row(self, row: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> NDArray[np.float32]:
        """Runs S new tokens of one row after its first `past` ones.

        Args:
            row: which row.
            ids: the new tokens.
            past: how many cached tokens count; later ones are overwritten.
            keep: how many last positions get logits; 0 is all.
            rope_length: the length that chooses between longrope's factors, if it is more than P + S.

        Returns:
            float32 [keep or S, V].

        """
        binding = self._bind(row, 1)
        tokens = np.array([ids], np.int64)
        mask = np.ones((1, past + len(ids)), np.int64)
        logits: NDArray[np.float32] = self._run(binding, tokens, mask, keep, rope_length)[0]
        self._logits[row] = logits[-1]
        return logits

    def choose(self, choices: Sequence[Choice], lengths: Sequence[int]) -> list[int]:
        """The token after each row's last one; `lengths` are the tokens that the rows hold."""
        return sample_rows(self._logits, choices)

    def run_step(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Runs one new token of every row, after `lengths` cached ones each."""
        if self._step is None:
            self._step = self._bind(0, self._shape[0])
        tokens = np.array(ids, np.int64)[:, None]
        total = np.array(lengths)[:, None] + 1
        mask = (np.arange(total.max()) < total).astype(np.int64)
        self._logits = list(self._run(self._step, tokens, mask, 1, 0)[:, 0])

    def drop(self, row: int) -> None:
        """Forgets a row; the last row takes its number."""
        rows = self._shape[0]
        self._shape = (rows - 1, *self._shape[1:])
        self._step = None
        self._logits.pop()  # worth nothing now; a step follows
        for index, buffer in enumerate(self._buffers):
            if row != rows - 1:
                buffer[row] = buffer[-1]
            self._buffers[index] = buffer[:-1]

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row, keeping what is cached."""
        rows, heads, before, size = self._shape
        if capacity <= before:
            return
        self._shape = (rows, heads, _round_up(capacity), size)
        self._step = None
        for index, buffer in enumerate(self._buffers):
            larger = np.zeros(self._shape, self._dtype)
            larger[:, :, :before] = buffer
            self._buffers[index] = larger

    def _bind(self, first: int, rows: int) -> IOBinding:
        """A binding of rows first .. first + rows of every buffer as past and as present."""
        binding = self._session.io_binding()
        shape = [rows, *self._shape[1:]]
        offset = first * int(np.prod(self._shape[1:])) * self._dtype.itemsize
        for past, present, buffer in zip(self._past, self._present, self._buffers, strict=True):
            address = buffer.ctypes.data + offset
            binding.bind_input(past, "cpu", 0, self._dtype, shape, address)
            binding.bind_output(present, "cpu", 0, self._dtype, shape, address)
        return binding

    def _run(
        self, binding: IOBinding, tokens: NDArray[np.int64], mask: NDArray[np.int64], keep: int, rope_length: int
    ) -> NDArray[np.float32]:
        inputs = _inputs(tokens, mask, keep, rope_length)
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        logits = np.empty((len(tokens), keep or tokens.shape[1], self._vocab_size), np.float32)
        binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits


class GrowingCache:
    """Each row's own keys and values [1, K, P, D], which every pass replaces by [1, K, T, D]; for graphs of standard
    operators.
    """

    def __init__(self, session: InferenceSession, decoding: Decoding, rows: int) -> None:
        self._session = session
        self._past = cache_names(decoding.cache.num_hidden_layers, "past_key_values")
        self._outputs = [LOGITS, *cache_names(decoding.cache.num_hidden_layers, "present")]
        shape = (1, decoding.cache.num_key_value_heads, 0, decoding.cache.head_dim)
        nothing = OrtValue.ortvalue_from_numpy(np.zeros(shape, np.dtype(decoding.cache.dtype)))
        self._rows = [[nothing] * len(self._past) for _ in range(rows)]
        self._logits = [np.empty(0, np.float32)] * rows

    def run_row(self, row: int, ids: Sequence[int], past: int, keep: int, rope_length: int) -> NDArray[np.float32]:
        """As `SharedCache.run_row`."""
        cached = self._rows[row]
        if cached[0].shape()[2] > past:
            cached = [
                OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :past])) for value in cached
            ]
        inputs = _inputs(np.array([ids], np.int64), np.ones((1, past + len(ids)), np.int64), keep, rope_length)
        inputs.update(zip(self._past, cached, strict=True))
        logits, *self._rows[row] = self._session.run_with_ort_values(self._outputs, inputs)
        found: NDArray[np.float32] = np.array(logits.numpy()[0])
        self._logits[row] = found[-1]
        return found

    def choose(self, choices: Sequence[Choice], lengths: Sequence[int]) -> list[int]:
        """As `SharedCache.choose`."""
        return sample_rows(self._logits, choices)

    def run_step(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """As `SharedCache.run_step`, one row after the other."""
        for row, (token, length) in enumerate(zip(ids, lengths, strict=True)):
            self.run_row(row, [token], length, 1, 0)

    def drop(self, row: int) -> None:
        """As `SharedCache.drop`."""
        last = self._rows.pop()
        self._logits.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def reserve(self, capacity: int) -> None:
        """As `SharedCache.reserve`; there is nothing to do."""


def _round_up(capacity: int) -> int:
    """A conversation grows by little; its buffers then grow now and then only."""
    return -(-capacity // 256) * 256


def _inputs(tokens: NDArray[np.int64], mask: NDArray[np.int64], keep: int, rope_length: int) -> dict[str, OrtValue]:
    """The graph's inputs but the cache; on the CPU an OrtValue is the array's memory and keeps it alive."""
    arrays = {
        INPUT_IDS: tokens,
        ATTENTION_MASK: mask,
        LOGITS_TO_KEEP: np.array([keep], np.int64),
        ROPE_LENGTH: np.array([rope_length], np.int64),
    }
    return {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
