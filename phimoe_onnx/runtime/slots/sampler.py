"""The bundle's sampling graph on a device, with all that it reads and writes: between two steps nothing but token ids
leaves the card.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS, LOGITS
from phimoe_onnx.errors import GenerationError
from phimoe_onnx.runtime.sampling import Choice, Sampling, sample_rows, uniform

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

_IDLE = Choice(Sampling(), (), ())
_SEEN = "seen"  # the sampling graph's input: the tokens that a penalty counts
_NONSENSE = "the graph's logits are not finite; check the bundle with phimoe-verify"


class DeviceSampler:
    """Logits, token ids, mask and seen tokens of `rows` places, which keep their addresses.

    The sampling graph runs over all places up to the last one that chooses; what it draws for the others is nobody's.
    """

    def __init__(self, session: InferenceSession, device: str, rows: int, capacity: int, vocab_size: int) -> None:
        self._session = session
        self._device = device
        self._rows, self._capacity, self._vocab_size = rows, capacity, vocab_size
        # each with its dtype and its shape but for the places
        self._values = {
            LOGITS: self._place(np.zeros((rows, 1, vocab_size), np.float32)),
            INPUT_IDS: self._place(np.zeros((rows, 1), np.int64)),
            ATTENTION_MASK: self._place(np.zeros((rows, capacity), np.int64)),
            _SEEN: self._place(np.zeros((rows, vocab_size), np.bool_)),
        }
        self.clear()

    def clear(self) -> None:
        """Forgets what the device holds."""
        self._tokens: dict[int, int] = {}  # by place: the ids on the device
        self._lengths: dict[int, int] = {}  # by place: the ones of its mask
        self._seen: dict[int, Collection[int]] = {}  # by place: the tokens that its `seen` counts, by identity

    def inherit(self, before: DeviceSampler, places: Mapping[int, int]) -> None:
        """Takes over the logits of another sampler: `places` says which of its places becomes which here."""
        logits, known = np.zeros((self._rows, 1, self._vocab_size), np.float32), before._values[LOGITS].numpy()
        for old, new in places.items():
            logits[new] = known[old]
        self._values[LOGITS].update_inplace(logits)

    def touch(self) -> None:
        """The mask is to be written anew: a place holds something else now."""
        self._lengths = {}

    def bind_logits(self, binding: IOBinding, place: int) -> None:
        """Makes a pass over one place write its logits [1, 1, V] here."""
        address = self._values[LOGITS].data_ptr() + place * self._vocab_size * 4
        binding.bind_output(LOGITS, self._device, 0, np.float32, [1, 1, self._vocab_size], address)

    def bind_step(self, binding: IOBinding, rows: int) -> None:
        """Makes a step over the first `rows` places read ids and mask here, and write its logits here."""
        self._bind_input(binding, INPUT_IDS, INPUT_IDS, rows)
        self._bind_input(binding, ATTENTION_MASK, ATTENTION_MASK, rows)
        self._bind_output(binding, LOGITS, LOGITS, rows)

    def prepare(self, tokens: Mapping[int, int], lengths: Mapping[int, int], others: Mapping[int, int]) -> None:
        """Brings the ids and the mask of a step to the device, unless the last `choose` has left them there.

        Args:
            tokens: by place, the new tokens.
            lengths: by place, the tokens that are cached.
            others: by place, the tokens cached where no token is run; the step writes behind them.

        """
        if tokens != self._tokens:
            ids = np.zeros((self._rows, 1), np.int64)
            for place, token in tokens.items():
                ids[place] = token
            self._values[INPUT_IDS].update_inplace(ids)
            self._tokens = dict(tokens)
        self._write_mask({place: length + 1 for place, length in lengths.items()}, others)

    def choose(
        self, choices: Mapping[int, Choice], lengths: Mapping[int, int], others: Mapping[int, int], rows: int
    ) -> dict[int, int | Exception]:
        """The next token of each place of `choices`, or its error; the mask counts it then.

        A place whose choice has a logits_processor is sampled on the host, for which all logits are brought there.
        `lengths` and `others` as for `prepare`, `rows` how many places run.
        """
        self._write_mask(lengths, others)
        self._write_seen(choices)
        binding = self._session.io_binding()
        for name in (LOGITS, ATTENTION_MASK, _SEEN):
            self._bind_input(binding, name, name, rows)
        columns = _columns(choices, rows, self._vocab_size)
        for name, array in columns.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name, output in {
            INPUT_IDS: INPUT_IDS, ATTENTION_MASK: f"next_{ATTENTION_MASK}", _SEEN: f"next_{_SEEN}",
        }.items():  # fmt: skip
            self._bind_output(binding, name, output, rows)
        self._session.run_with_iobinding(binding)
        ids = self._values[INPUT_IDS].numpy()[:, 0]
        self._tokens = {place: int(ids[place]) for place in choices}
        self._lengths = {place: length + 1 for place, length in lengths.items()}
        chosen: dict[int, int | Exception] = {
            place: token if token >= 0 else GenerationError(_NONSENSE) for place, token in self._tokens.items()
        }
        if processed := {place: choice for place, choice in choices.items() if choice.logits_processor}:
            logits = self.logits()
            chosen |= sample_rows({place: logits[place] for place in processed}, processed)
            self._seen = {}
        return chosen

    def logits(self) -> NDArray[np.float32]:
        """Every place's logits [rows, V], brought to the host."""
        found: NDArray[np.float32] = self._values[LOGITS].numpy()[:, 0].copy()
        return found

    def _write_mask(self, lengths: Mapping[int, int], others: Mapping[int, int]) -> None:
        """Ones for the tokens, and one more where a place only computes along, so that it writes behind its own."""
        if all(self._lengths.get(place) == length for place, length in lengths.items()):
            return
        ones = np.ones((self._rows, 1), np.int64)
        for place, length in others.items():
            ones[place] = length + 1
        for place, length in lengths.items():
            ones[place] = length
        self._values[ATTENTION_MASK].update_inplace((np.arange(self._capacity) < ones).astype(np.int64))
        self._lengths = dict(lengths)

    def _write_seen(self, choices: Mapping[int, Choice]) -> None:
        """The places' tokens so far, if a penalty counts them and the device has not counted them along."""
        counted = {place: choice.seen for place, choice in choices.items()}
        if counted.keys() == self._seen.keys() and all(
            counted[place] is before for place, before in self._seen.items()
        ):
            return
        self._seen = {}
        if any(choice.sampling.repetition_penalty != 1 for choice in choices.values()):
            seen = np.zeros((self._rows, self._vocab_size), np.bool_)
            for place, tokens in counted.items():
                seen[place, np.fromiter(tokens, np.int64, len(tokens))] = True
            self._values[_SEEN].update_inplace(seen)
            self._seen = counted

    def _bind_input(self, binding: IOBinding, value: str, name: str, rows: int) -> None:
        array, shape = self._values[value], self._values[value].shape()
        element = {LOGITS: np.float32, _SEEN: np.bool_}.get(value, np.int64)
        binding.bind_input(name, self._device, 0, element, [rows, *shape[1:]], array.data_ptr())

    def _bind_output(self, binding: IOBinding, value: str, name: str, rows: int) -> None:
        array, shape = self._values[value], self._values[value].shape()
        element = {LOGITS: np.float32, _SEEN: np.bool_}.get(value, np.int64)
        binding.bind_output(name, self._device, 0, element, [rows, *shape[1:]], array.data_ptr())

    def _place(self, array: NDArray[Any]) -> OrtValue:
        return OrtValue.ortvalue_from_numpy(array, self._device, 0)


def _columns(choices: Mapping[int, Choice], rows: int, vocab_size: int) -> dict[str, NDArray[Any]]:
    """The sampling graph's inputs from the host, [rows, 1] each but `greedy` [1]."""
    places = [choices.get(place, _IDLE) for place in range(rows)]
    options = [choice.sampling for choice in places]
    columns: dict[str, NDArray[Any]] = {"greedy": np.array([all(each.temperature == 0 for each in options)])}
    columns["repetition_penalty"] = np.array([[each.repetition_penalty] for each in options], np.float32)
    columns["temperature"] = np.array([[each.temperature or 1] for each in options], np.float64)
    columns["top_k"] = np.array(
        [[1 if each.temperature == 0 else each.top_k or vocab_size] for each in options], np.int64
    )
    columns["top_p"] = np.array([[each.top_p] for each in options], np.float64)
    columns["min_p"] = np.array([[each.min_p] for each in options], np.float64)
    steps = [uniform(choice.sampling.seed, len(choice.token_ids)) for choice in places]
    columns["u"] = np.array([[step] for step in steps], np.float64)
    return columns
