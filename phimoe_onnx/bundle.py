"""A bundle on disk: its files, its manifest and the names in its graph; what the exporter and the runtime agree on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimoe_onnx.errors import BundleError, ConfigError
from phimoe_onnx.files import read_json, sha256

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SAMPLING = "sampling.onnx"  # beside CUDA's graph: spec/sampling.md for the device
PREFILL_CHUNK = {
    "cpu": 512,
    "cuda": 4096,
    "portable": 512,
}  # enough to fill the matrix products, and bounds their memory
HASH_LIMIT = (
    256 << 20
)  # bytes; larger files are hashed only when asked, since reading 20 GB takes longer than loading them

# The names in a graph. text-generation has all of them but LAST_HIDDEN_STATE. The other tasks run whole texts, without
# a cache: input_ids and attention_mask [batch, sequence] give text-classification's logits or feature-extraction's
# last_hidden_state.
TASKS = ("text-generation", "text-classification", "feature-extraction")
INPUT_IDS = "input_ids"  # int64 [batch, sequence]
ATTENTION_MASK = "attention_mask"  # int64 [batch, past + sequence]: 1 for a real token; rows are padded on the right
# float32 [batch, sequence or logits_to_keep, vocab_size]; a classifier's [batch, labels], at the last real token
LOGITS = "logits"
LAST_HIDDEN_STATE = "last_hidden_state"  # float32 [batch, sequence, hidden_size], after the final norm
LOGITS_TO_KEEP = "logits_to_keep"  # optional int64 [1]: how many last positions get logits; 0, the default, is all
ROPE_LENGTH = (
    "rope_length"  # optional int64 [1]: rows count as at least this long when rope factors are chosen; default 0
)
CACHE_WIDTHS = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
}  # bytes of each dtype that a cache may have
OPTIONAL_INPUTS = (LOGITS_TO_KEEP, ROPE_LENGTH)


def cache_names(num_hidden_layers: int, prefix: str) -> list[str]:
    """The cache's names in graph order; `prefix` is "past_key_values" or "present"; each [batch, kv_heads, length,
    head_dim].
    """
    return [f"{prefix}.{layer}.{part}" for layer in range(num_hidden_layers) for part in ("key", "value")]


@dataclass(frozen=True)
class Graph:
    """One graph file over the bundle's weights, and the least ONNX Runtime release that loads it.

    `optional_inputs` have a default. ONNX Runtime's releases for Java, Node and browsers cannot give values to those,
    so there a graph without any is to be taken: it has all inputs as plain ones.
    """

    file: str
    minimum_onnxruntime: str
    optional_inputs: tuple[str, ...] = OPTIONAL_INPUTS


@dataclass(frozen=True)
class ChatFormat:
    """The chat template as plain strings: a turn is prefix + content + suffix, and `generation` opens the answer.

    `turns` maps a role to (prefix, suffix); the roles in `skipped_when_empty` have no turn where the content is empty.
    None in the manifest where the template cannot be said this way.
    """

    turns: dict[str, tuple[str, str]]
    generation: str
    skipped_when_empty: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheShape:
    """One of the cache's arrays is [batch, num_key_value_heads, length, head_dim] of `dtype`; there are two a layer,
    key and value.

    An int4 cache has the dtype "uint8" and half the model's head_dim: each number holds two channels.
    `shared` says whether past and present may be one buffer, of any greater length, that the graph writes in place;
    where it is false, `present` is past + new.
    """

    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: str
    shared: bool

    @property
    def bytes_per_token(self) -> int:
        """Of one row, all layers together."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * CACHE_WIDTHS[self.dtype]


@dataclass(frozen=True)
class Decoding:
    """What a generation loop must know, in any language; spec/embedding.md says how it is used.

    Attributes:
        vocab_size: the logits' width.
        context: the most tokens of a sequence, the prompt's and the new ones.
        rope_boundary: the length beyond which longrope rotates every position by other factors; None without longrope.
        prefill_chunk: how many tokens of a prompt run at once.
        eos_token_ids: the tokens that end a text.
        hidden_tokens: the special tokens that are no text, by their own; a byte of a character is text.
        cache: its shape.
    """

    vocab_size: int
    context: int
    rope_boundary: int | None
    prefill_chunk: int
    eos_token_ids: tuple[int, ...]
    hidden_tokens: dict[str, int]
    cache: CacheShape


@dataclass(frozen=True)
class Classes:
    """What a classifier's logits mean.

    Attributes:
        labels: a name for each logit.
        function_to_apply: "softmax", "sigmoid" or "none": what makes scores of the logits.
    """

    labels: tuple[str, ...]
    function_to_apply: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    Attributes:
        task: one of TASKS.
        target: "cpu", "cuda" or "portable"; a portable graph's `present` is past + new, the others' may be one buffer.
        quantize: "none", "fp16", "int8" or "int4".
        dtype: activations, "float32", "float16" or "bfloat16".
        weights: how each kind of weight is stored, as {"experts": "int4, block 32", ...}.
        graphs: in order of preference.
        files: size in bytes and SHA-256 of every other file, by name.
        classes: of text-classification, else None.
        parity: the summary of the last `phimoe-verify`, if one was run.
    """

    tool_version: str
    source: str
    task: str
    target: str
    quantize: str
    dtype: str
    weights: dict[str, str]
    graphs: tuple[Graph, ...]
    decoding: Decoding
    files: dict[str, dict[str, Any]]
    chat: ChatFormat | None = None
    classes: Classes | None = None
    parity: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def write(self, bundle: Path) -> None:
        """Writes manifest.json into `bundle`."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        draft = bundle / f".{MANIFEST}"  # renamed in one step, so that a reader never sees half of it
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(bundle / MANIFEST)


def read_manifest(bundle: Path) -> Manifest:
    """Reads `bundle`/manifest.json.

    Raises:
        BundleError: there is no bundle here, or its manifest is damaged or of a newer format.
    """
    try:
        raw = read_json(bundle / MANIFEST)
    except ConfigError as error:
        raise BundleError(f"not a bundle of phimoe-export: {error}") from None
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{bundle / MANIFEST}: format_version is {version}, this release reads {FORMAT_VERSION}; upgrade "
            f"phimoe-onnx"
        )
    try:
        raw["graphs"] = tuple(
            Graph(**graph | {"optional_inputs": tuple(graph["optional_inputs"])}) for graph in raw["graphs"]
        )
        if chat := raw.get("chat"):
            turns = {role: (prefix, suffix) for role, (prefix, suffix) in chat["turns"].items()}
            raw["chat"] = ChatFormat(turns, chat["generation"], tuple(chat["skipped_when_empty"]))
        if raw["task"] == "text-classification":
            raw["classes"] = Classes(tuple(raw["classes"]["labels"]), raw["classes"]["function_to_apply"])
        raw["decoding"] = _decoding(raw["decoding"])
        return Manifest(**raw)
    except (TypeError, KeyError, ValueError) as error:
        raise BundleError(f"{bundle / MANIFEST}: is damaged ({error}); export the bundle again") from None


def _decoding(raw: dict[str, Any]) -> Decoding:
    decoding = Decoding(**raw | {"eos_token_ids": tuple(raw["eos_token_ids"]), "cache": CacheShape(**raw["cache"])})
    cache = decoding.cache
    counts = [decoding.vocab_size, decoding.context, decoding.prefill_chunk, cache.num_hidden_layers]
    counts += [
        cache.num_key_value_heads,
        cache.head_dim,
        1 if decoding.rope_boundary is None else decoding.rope_boundary,
    ]
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError("a number of its decoding section is not a positive integer")
    if cache.dtype not in CACHE_WIDTHS:
        raise ValueError(f"the cache's dtype is {cache.dtype!r}")
    if not all(type(id) is int for id in (*decoding.eos_token_ids, *decoding.hidden_tokens.values())):
        raise ValueError("a token id of its decoding section is not an integer")
    return decoding


def check_files(bundle: Path, manifest: Manifest, *, hash_everything: bool = False) -> None:
    """Holds every file against the manifest: its size always, its SHA-256 up to `HASH_LIMIT` bytes or when asked.

    Raises:
        BundleError: a file is missing, or is not the one that was exported.
    """
    for name, expected in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            raise BundleError(f"{path}: is missing; the bundle is incomplete, copy or export it again")
        size = path.stat().st_size
        if size != expected["size"]:
            raise BundleError(
                f"{path}: has {size} bytes, the manifest says {expected['size']}; copy or export the bundle again"
            )
        if (hash_everything or size <= HASH_LIMIT) and sha256(path) != expected["sha256"]:
            raise BundleError(
                f"{path}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again"
            )


def describe_files(bundle: Path, advance: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in `bundle` but the manifest, by name; `advance` is called with the bytes just
    read.
    """
    paths = _files(bundle)
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # hashlib lets other threads run
        hashes = workers.map(lambda path: sha256(path, advance), paths)
        return {
            path.name: {"size": path.stat().st_size, "sha256": hash} for path, hash in zip(paths, hashes, strict=True)
        }


def _files(bundle: Path) -> list[Path]:
    return [
        path
        for path in sorted(bundle.iterdir())
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    ]
