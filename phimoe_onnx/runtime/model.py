"""PhiMoE: a loaded bundle, and what one can ask of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from phimoe_onnx.bundle import MANIFEST, TASKS, Manifest, check_files, unchanged
from phimoe_onnx.errors import BundleError, DeviceError, GenerationError, brief
from phimoe_onnx.runtime.classification import Classification, classify
from phimoe_onnx.runtime.conversation import Conversation
from phimoe_onnx.runtime.decoder import Decoder, Decoders
from phimoe_onnx.runtime.engine import Engine
from phimoe_onnx.runtime.generate import PieceStream, generate
from phimoe_onnx.runtime.ort.session import open_sampling, open_sessions
from phimoe_onnx.runtime.ort.threads import Sessions
from phimoe_onnx.runtime.probe import Probe, Routing
from phimoe_onnx.runtime.request import Options, Request, check_names, integer, make_request
from phimoe_onnx.runtime.row import Generation
from phimoe_onnx.runtime.texts import run_texts
from phimoe_onnx.text.template import ChatTemplate, Message, Tools
from phimoe_onnx.text.tokenizer import Tokenizer, check_characters

Prompt = str | Sequence[int] | Sequence[Message]
# lists, for a string is a sequence of strings
Batch = list[str] | list[list[int]] | list[list[dict[str, str]]] | list[Prompt]


@dataclass(frozen=True)
class Score:
    """How likely a text is.

    Attributes:
        token_ids: the text's tokens, n of them.
        logprobs: float32 [n - 1], the natural logarithm of the probability of each token but the first, given those
            before it.

    """

    token_ids: list[int]
    logprobs: NDArray[np.float32]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability of a token."""
        return float(np.exp(-self.logprobs.mean(dtype=np.float64)))


class PhiMoE:
    """A loaded bundle; `PhiMoE.load` makes one.

    A bundle serves one task: text-generation `generate`, `chat`, `score` and `logits`; text-classification `classify`;
    feature-extraction `embed`; any of them `routing` and `hidden_states`. Its methods may be called from several
    threads; what they generate runs side by side.

    Attributes:
        manifest: the bundle's manifest.
        decoding: its section about the model's shape and special tokens.
        tokenizer: text to token ids and back.
        eos: the token ids that end a text.
        engine: what `generate` and `chat` stand on, for a service that hands in requests by itself.

    """

    def __init__(
        self,
        sessions: Sessions,
        manifest: Manifest,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        device: str = "cpu",
        sampling: InferenceSession | None = None,
        cache_limit: int | None = None,
        cuda_graphs: bool = False,
        slots: int = 64,
        queue: int = 1024,
        capacity: int | None = None,
        open_probe: Callable[[], Probe] | None = None,
    ) -> None:
        self.manifest = manifest
        self.decoding = manifest.decoding
        self.tokenizer = tokenizer
        self.eos = frozenset(manifest.decoding.eos_token_ids)
        self._sessions = sessions
        self._on_host = sampling is None  # where logits and cache are
        self._template = template
        self._room = min(manifest.decoding.context, capacity or manifest.decoding.context)  # of one request, in tokens
        self._decoders = Decoders(
            sessions, manifest.decoding, device, sampling, cache_limit, idle={} if cuda_graphs else None
        )
        self.engine = Engine(self._decoders.open, tokenizer, slots, queue)
        self._open_probe = open_probe
        self._probe: Probe | None = None
        self._probe_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        *,
        memory_limit: int | None = None,
        cuda_graphs: bool = False,
        slots: int = 64,
        queue: int = 1024,
        capacity: int | None = None,
    ) -> PhiMoE:
        """Loads a bundle that phimoe-export wrote.

        Args:
            bundle: its folder.
            device: "cpu" or "cuda"; never another than the one asked for.
            threads: threads for one operator, from 1 to 256 or the number of processors, whichever is more. None is one
                a physical core, and a single one for passes that are too small for more.
            memory_limit: on CUDA, the bytes that weights and passes may take, and that a cache may take beside the
                weights, so that several models share a card.
            cuda_graphs: on CUDA, record a decode step once and replay it. A model then serves one thread, and keeps a
                cache for each number of rows and power of two of tokens that it was asked for.
            slots: how many prompts run at once, conversations that rest included; more of a batch wait for their turn.
            queue: how many prompts may wait while others come; beyond it `generate` raises EngineFullError. A batch
                that comes when fewer wait is taken whole.
            capacity: the most tokens that one prompt and its new tokens may have together, where that is to be less
                than the context. slots x capacity bounds the caches' memory.

        Raises:
            GenerationError: slots or capacity is less than 1, or queue less than 0.
            OutOfMemoryError: the device has too little memory, or the limit leaves too little.
            BundleError: the folder is no bundle, or a file of it is missing or changed, also while it is loaded.
            DeviceError: the device or the installed ONNX Runtime cannot run the bundle.

        """
        slots, queue = integer("slots", slots), integer("queue", queue)
        capacity = None if capacity is None else integer("capacity", capacity)
        for name, value, least in (("slots", slots, 1), ("queue", queue, 0), ("capacity", capacity, 1)):
            if value is not None and value < least:
                raise GenerationError(f"{name} is {brief(value)}, expected {least} or more")
        folder = Path(bundle)
        with unchanged(folder) as manifest:
            if manifest.task not in TASKS:
                raise BundleError(
                    f"{folder / MANIFEST}: is of a bundle for {manifest.task[:80]}, expected one for {', '.join(TASKS)}"
                )
            check_files(folder, manifest)
            decoding = manifest.decoding
            tokenizer = Tokenizer(folder, decoding.hidden_tokens.values(), decoding.clean_up_tokenization_spaces)
            template = ChatTemplate(folder)
            sessions = open_sessions(folder, manifest, device, threads, memory_limit, cuda_graphs)
            sampling = open_sampling(folder, manifest, device)
        cache_limit = None if memory_limit is None else memory_limit - sessions.weights
        open_probe = partial(Probe.open, folder, manifest, threads) if device == "cpu" else None
        options = (sampling, cache_limit, cuda_graphs, slots, queue, capacity, open_probe)
        return cls(sessions, manifest, tokenizer, template, device, *options)

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Generation: ...
    @overload
    def generate(
        self, prompt: Batch, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> list[Generation]: ...
    @overload
    def generate(self, prompt: Prompt | Batch, *, stream: Literal[True], **options: Unpack[Options]) -> PieceStream: ...
    def generate(
        self, prompt: Prompt | Batch, *, stream: bool = False, **options: Unpack[Options]
    ) -> Generation | list[Generation] | PieceStream:
        """Continues one prompt, or each prompt of a batch exactly as if it were alone.

        Args:
            prompt: a string, a list of messages {"role": ..., "content": ...} or a list of token ids; a list of any of
                these is a batch, and so is an array [batch, tokens]. A message's content may also be None or a list of
                {"type": "text", "text": ...}; it and other keys, such as "tool_calls", are the chat template's to read.
            stream: whether to return an iterator that yields a `Piece` a token, as they come.
            options: keywords, each of them optional; None is as if it were not given:

                - max_new_tokens: where to end at the latest; 1024 or the end of the context if not given.
                - temperature: 0, the default, takes the most likely token; more draws one.
                - top_k, top_p, min_p, repetition_penalty: see `sampling.Sampling`; all off by default.
                - seed: the same seed gives the same text; a fresh one for each row if not given. A batch's row has the
                  random numbers that its prompt would have alone, so equal prompts with one seed have equal texts.
                - stop: a string or several at which the text ends, themselves left out.
                - logits_processor: a function that is called for every new token with the new tokens so far and the
                  logits float32 [vocab_size], and returns the logits to go on with: a bias, a grammar (-inf is never
                  drawn), or the same after a look at them. On a device it brings the logits to the host, which costs
                  time. What it raises comes to this caller.
                - logprobs: 1 to 20: each new token comes with its log-probability and those of so many most likely
                  tokens, as `Logprobs`, in `Piece.logprobs` and, one for each of token_ids, in `Generation.logprobs`.
                  They are the model's own, before temperature, penalty and logits_processor, and change no token. On a
                  device they bring the logits to the host, which costs time.
                - speculate: whether what the text repeats is computed ahead, several tokens in one pass, which changes
                  nothing but the time (docs/speculation.md). It is, where a pass of several tokens gives each the bits
                  that it has alone: bundles of native operators on the CPU. True is for others, where the last bits of
                  logits may differ, and with them a token; False is never.
                - tools: JSON schemas of functions, for a chat template that knows them.

        Returns:
            A `Generation`, or a list of them for a batch, or an iterator of `Piece` for a stream.

        Raises:
            GenerationError: a prompt is empty or does not fit the context, or an option is out of range; before the
                first piece of a stream.
            EngineFullError: all slots are taken, and as many prompts wait as may; before the first piece of a stream.
            OutOfMemoryError: there is no memory for the prompt's cache.
            BundleError: the bundle serves another task; so do the methods below.

        """
        self._expect("text-generation", "generate")
        batch = _is_batch(prompt)
        prompts = cast("Sequence[Prompt]", prompt if batch else [prompt])
        if not len(prompts):
            raise GenerationError("the batch is empty; give at least one prompt")
        requests = [
            self.request(each, f"prompt {row}" if batch else "the prompt", **options)
            for row, each in enumerate(prompts)
        ]
        pieces = generate(self.engine, requests)
        if stream:
            return pieces
        results = {piece.row: piece.result for piece in pieces if piece.result}
        return [results[row] for row in range(len(requests))] if batch else results[0]

    def chat(self, system: str | None = None) -> Conversation:
        """A conversation that keeps its cache from turn to turn, opened by a system message if one is given."""
        self._expect("text-generation", "chat")
        return Conversation(self.engine, self.request, system)

    @overload
    def score(self, text: Prompt) -> Score: ...
    @overload
    def score(self, text: Batch) -> list[Score]: ...
    def score(self, text: Prompt | Batch) -> Score | list[Score]:
        """The log-probability of every token of a text, or of each text of a batch, in one forward pass over all of it.

        Texts of a batch run one after the other, so each has the numbers, to the bit, that it has alone.

        Args:
            text: as for `classify`.

        Raises:
            GenerationError: a text has fewer than two tokens or more than the context holds, or an id outside the
                vocabulary, before any is run.

        """
        self._expect("text-generation", "score")
        texts, batch = self._encode_texts(text)
        for number, ids in enumerate(texts):
            if len(ids) < 2:
                name = f"text {number}" if batch else "the text"
                raise GenerationError(
                    f"{name} has one token; a score needs two, since the first one has nothing before it"
                )
        scores = [self._score(ids) for ids in texts]
        return scores if batch else scores[0]

    def _score(self, ids: list[int]) -> Score:
        logprobs = np.empty(len(ids) - 1, np.float32)
        start = 0
        for logits in self._logits(ids):
            targets = ids[start + 1 : start + 1 + len(logits)]
            logits -= logits.max(axis=-1, keepdims=True)
            chosen = logits[np.arange(len(targets)), targets]
            logprobs[start : start + len(targets)] = chosen - np.log(np.exp(logits[: len(targets)]).sum(axis=-1))
            start += len(logits)
        return Score(ids, logprobs)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after every token, float32 [n, vocab_size], in one forward pass over all of them.

        Raises:
            GenerationError: no tokens, more than the context holds, or an id outside the vocabulary.

        """
        self._expect("text-generation", "logits")
        return np.concatenate(list(self._logits(self.encode(token_ids))))

    @overload
    def classify(self, text: Prompt) -> Classification: ...
    @overload
    def classify(self, text: Batch) -> list[Classification]: ...
    def classify(self, text: Prompt | Batch) -> Classification | list[Classification]:
        """The labels of one text, or of each text of a batch as if it were alone.

        Texts of like length run together, up to `texts.BATCH_TOKENS` tokens at once; a longer text runs alone.

        Args:
            text: a string, a list of messages or a list of token ids; a list of any of these is a batch, and may be
                empty.

        Raises:
            GenerationError: a text is empty, or has more tokens than the context holds, before any is run.

        """
        self._expect("text-classification", "classify")
        ids, batch = self._encode_texts(text)
        assert self.manifest.classes
        results = [classify(logits, self.manifest.classes) for logits in run_texts(self._sessions.main, ids)]
        return results if batch else results[0]

    def embed(self, text: Prompt | Batch) -> NDArray[np.float32]:
        """The hidden state of a text's last token, after the final norm: float32 [hidden_size], or [n, hidden_size] for
        a batch.

        Arguments, errors and what runs together are as for `classify`.
        """
        self._expect("feature-extraction", "embed")
        ids, batch = self._encode_texts(text)
        results = run_texts(self._sessions.main, ids)
        return results if batch else results[0]

    def routing(self, text: Prompt) -> Routing:
        """Which experts each token of a text takes in each layer, with what weights, and how near others were.

        The first call opens the graph once more, which takes the memory of its weights again; see probe.py.

        Args:
            text: as for `encode`; of any task's bundle.

        Raises:
            GenerationError: the text is empty, or has more tokens than the context holds.
            DeviceError: the model was loaded on another device than the CPU.
            BundleError: the bundle was changed since it was loaded, or was written by an older exporter.
            OutOfMemoryError: there is too little memory.

        """
        ids = self._encode_whole(text, "the text")
        return self._inside().routing(ids)

    def hidden_states(self, text: Prompt) -> NDArray[np.float32]:
        """What runs from layer to layer while a text is read: float32 [layers + 1, tokens, hidden_size].

        Number i is what goes into layer i, so 0 are the embeddings. The last one is what the final norm makes of the
        last layer's, as transformers has it. Arguments and errors are as for `routing`.
        """
        ids = self._encode_whole(text, "the text")
        return self._inside().hidden_states(ids)

    def _inside(self) -> Probe:
        if self._open_probe is None:
            raise DeviceError("only on the CPU can the inside of a graph be read; load the bundle with device='cpu'")
        with self._probe_lock:
            if self._probe is None:
                self._probe = self._open_probe()
        return self._probe

    def encode(
        self, prompt: Prompt, name: str = "the prompt", tools: Tools | None = None, limit: int | None = None
    ) -> list[int]:
        """The token ids of a prompt; `name` is its name in errors.

        With a `limit` a text of far more tokens is refused by its beginning: all of it might take a minute.

        Raises:
            GenerationError: the prompt is empty, or neither text, messages nor ids; the chat template refuses it; an id
                is outside the vocabulary; or the limit.

        """
        if isinstance(prompt, np.ndarray) and prompt.ndim > 1:
            raise GenerationError(f"{name} is an array of the shape {list(prompt.shape)}, expected token ids [tokens]")
        if not isinstance(prompt, str) and not _is_list(prompt):
            kind = type(prompt).__name__
            raise GenerationError(f"{name} is of type {kind}, expected a string, or a list of messages or token ids")
        if not len(prompt):
            raise GenerationError(f"{name} is empty; give at least one character, message or token")
        if isinstance(prompt, str):
            return self._encode_text(prompt, name, limit, special=True)
        if isinstance(prompt[0], Mapping):
            text = self._template.render(cast("Sequence[Message]", prompt), tools)
            return self._encode_text(text, name, limit, special=False)
        return self._check_ids(prompt, name)

    def _encode_text(self, text: str, name: str, limit: int | None, *, special: bool) -> list[int]:
        check_characters(text, name)
        beginning = text if limit is None else text[: 8 * limit]
        if limit is not None and len(beginning) < len(text) and len(self.tokenizer.encode(beginning)) > limit:
            raise GenerationError(
                f"{name} has {len(text)} characters, of which the first {len(beginning)} are more tokens than the "
                f"context of {limit}; shorten it"
            )
        return self._check_ids(self.tokenizer.encode(text, special=special), name)

    def _check_ids(self, items: Sequence[Any], name: str) -> list[int]:
        ids = []
        for item in items:
            whole = isinstance(item, int | np.integer) and not isinstance(item, bool)
            if not whole or not 0 <= item < self.decoding.vocab_size:
                raise GenerationError(
                    f"{name} holds {brief(item)}, expected token ids from 0 to {self.decoding.vocab_size - 1}"
                )
            ids.append(int(item))
        return ids

    def request(self, prompt: Prompt, name: str = "the prompt", **options: Unpack[Options]) -> Request:
        """A prompt and the options of `generate`, checked.

        Raises:
            GenerationError: as for `generate`.

        """
        check_names(options)
        others: dict[str, Any] = dict(options)
        if others.get("speculate") is None:
            others["speculate"] = self._sessions.per_token and self._on_host
        elif others["speculate"] and not self._on_host:
            raise GenerationError("speculate=True is for device='cpu'; leave it out")
        ids = self.encode(prompt, name, others.pop("tools", None), self._room)
        return make_request(ids, self._room, name, self.eos, **others)

    def decoder(self, slots: int, capacity: int) -> Decoder:
        """Empty caches beside the engine's, for `slots` slots of up to `capacity` tokens.

        Raises:
            OutOfMemoryError: there is no memory for them.

        """
        return self._decoders.open(slots, capacity)

    def _expect(self, task: str, method: str) -> None:
        if self.manifest.task != task:
            raise BundleError(f"{method}() needs a bundle for {task}, this one is for {self.manifest.task}")

    def _encode_texts(self, text: Prompt | Batch) -> tuple[list[list[int]], bool]:
        """The token ids of each text, and whether it was a batch."""
        batch = _is_batch(text) or (_is_list(text) and not len(text))
        ids = []
        for number, each in enumerate(cast("Sequence[Prompt]", text if batch else [text])):
            ids.append(self._encode_whole(each, f"text {number}" if batch else "the text"))
        return ids, batch

    def _encode_whole(self, text: Prompt, name: str) -> list[int]:
        ids = self.encode(text, name, limit=self.decoding.context)
        if not 0 < len(ids) <= self.decoding.context:
            raise GenerationError(f"{name} has {len(ids)} tokens, expected 1 to {self.decoding.context} (the context)")
        return ids

    def _logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        if len(ids) > self.decoding.context:
            raise GenerationError(f"the text has {len(ids)} tokens, the context holds {self.decoding.context}")
        return self.decoder(1, len(ids)).logits(ids)


def _is_batch(prompt: Prompt | Batch) -> bool:
    """Whether this is several prompts: a list whose first item is itself a string or a list."""
    return _is_list(prompt) and len(prompt) > 0 and not isinstance(prompt[0], Mapping | int | np.integer)


def _is_list(value: object) -> bool:
    """Whether there are items in this, or might be; a text has none, nor have bytes, nor a single number."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
