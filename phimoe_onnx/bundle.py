"""A bundle on disk: its files, its manifest and the names in its graph; what the exporter and the runtime agree on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from phimoe_onnx import bundle_v1
from phimoe_onnx.errors import BundleError, ConfigError, brief
from phimoe_onnx.files import read_json, sha256

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SAMPLING = "sampling.onnx"  # beside CUDA's graph: spec/sampling.md for the device
LARGEST = 2**31 - 1  # of any number of a manifest but a file's size
# bytes; larger files are hashed only when asked, since reading 20 GB takes longer than loading them
HASH_LIMIT = 256 << 20

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
# optional int64 [1]: rows count as at least this long when rope factors are chosen; default 0
ROPE_LENGTH = "rope_length"
# bytes of each dtype that a cache may have
CACHE_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
OPTIONAL_INPUTS = (LOGITS_TO_KEEP, ROPE_LENGTH)
NATIVE_OPERATORS = "phimoe.native.1"  # what a graph of the native operators requires: their domain and its version


def cache_names(num_hidden_layers: int, prefix: str) -> list[str]:
    """The cache's names in graph order; `prefix` is "past_key_values" or "present"; each [batch, kv_heads, length,
    head_dim].
    """
    return [f"{prefix}.{layer}.{part}" for layer in range(num_hidden_layers) for part in ("key", "value")]


# The types of an untrusted manifest, as spec/embedding.md states them; msgspec holds a file against them, strictly:
# true is no number, "1" is none either.
Count = Annotated[int, Meta(ge=1, le=LARGEST)]
TokenId = Annotated[int, Meta(ge=0, le=LARGEST)]
_FILE_NAME = r"\A(?!\.{1,2}\Z)[^/\\:\x00\ud800-\udfff]+\Z"
_RELEASE = r"\A[0-9]{1,9}(\.[0-9]{1,9})*\Z"
_SHA256 = r"\A[0-9a-f]{64}\Z"
_WORDS = {_FILE_NAME: "a plain file name", _RELEASE: 'a release such as "1.31"', _SHA256: "64 hexadecimal digits"}
FileName = Annotated[str, Meta(pattern=_FILE_NAME)]
Release = Annotated[str, Meta(pattern=_RELEASE)]
Sha256 = Annotated[str, Meta(pattern=_SHA256)]
CacheDtype = Literal["float32", "float16", "bfloat16", "int8", "uint8"]


@dataclass(frozen=True)
class Graph:
    """One graph file over the bundle's weights, and what it takes to run it.

    Attributes:
        file: its name.
        devices: "cpu", "cuda" -> the least ONNX Runtime release that loads it there.
        optional_inputs: those that have a default. ONNX Runtime's releases for Java, Node and browsers cannot give
            values to them, so there a graph without any is to be taken: it has all inputs as plain ones.
        requires: what it needs beyond an ONNX Runtime release; a reader passes over a graph with a name unknown to it.
    """

    file: FileName
    devices: Annotated[dict[str, Release], Meta(min_length=1)]
    optional_inputs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()


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

    num_hidden_layers: Count
    num_key_value_heads: Count
    head_dim: Count
    dtype: CacheDtype
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
        sampling_graph: the file of the graph that draws tokens on a device; None where the host draws them.
        clean_up_tokenization_spaces: whether decoded text loses the spaces before punctuation; see text/clean_up.py.
    """

    vocab_size: Count
    context: Count
    rope_boundary: Count | None
    prefill_chunk: Count
    eos_token_ids: tuple[TokenId, ...]
    hidden_tokens: dict[str, TokenId]
    cache: CacheShape
    sampling_graph: FileName | None = None
    clean_up_tokenization_spaces: bool = False


@dataclass(frozen=True)
class Classes:
    """What a classifier's logits mean.

    Attributes:
        labels: a name for each logit.
        function_to_apply: "softmax", "sigmoid" or "none": what makes scores of the logits.
    """

    labels: Annotated[tuple[str, ...], Meta(min_length=1)]
    function_to_apply: Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class StoredWeights:
    """How some parameters are stored; the groups of a manifest cover all of them.

    Attributes:
        parameters: modeling.py's names; those of layers without "model.layers.N.".
        layers: the first and the last of a run of layers; None where the names are whole.
        dtype: "float32", "float16", "bfloat16", or integers of so many bits, "int8", "int4", "int3", "int2".
        block_size: of integers, how many neighbours of a row share a scale; else None.
        scale_dtype: of integers, their scales' dtype; else None.
        symmetric: whether the codes lie around their middle; else each block has a zero point.
        layout: "rows", as ONNX Runtime's operators read them, or "strips", as the native operators do: there a block's
            scale is an integer times a number of `scale_dtype` (native/FORMAT.md).
    """

    parameters: tuple[str, ...]
    layers: tuple[int, int] | None
    dtype: str
    block_size: Count | None = None
    scale_dtype: str | None = None
    symmetric: bool = True
    layout: str = "rows"

    def names(self) -> Iterator[str]:
        """The whole names of all its parameters."""
        if self.layers is None:
            yield from self.parameters
            return
        first, last = self.layers
        for layer in range(first, last + 1):
            yield from (f"model.layers.{layer}.{name}" for name in self.parameters)


@dataclass(frozen=True)
class File:
    """A file's size in bytes and its SHA-256 in hexadecimal."""

    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json.

    Attributes:
        source: the checkpoint's name, or its hub id and commit.
        task: one of TASKS.
        target: what the bundle was exported for, as the exporter calls it; for people, no reader decides by it.
        quantize: the exporter's option; for people, too.
        dtype: of the activations, "float32", "float16" or "bfloat16".
        recipe: a SHA-256 of how each parameter is stored; None in bundles of version 1.
        weights: how each parameter is stored.
        graphs: in order of preference.
        files: every other file, by name.
        classes: of text-classification, else None.
        calibration: the text that the weights were rounded for, if there was one; for people.
        parity: the summary of the last `phimoe-verify`, if one was run.
    """

    format_version: int = FORMAT_VERSION
    tool_version: str
    source: str
    task: str
    target: str
    quantize: str
    dtype: str
    recipe: str | None = None
    weights: tuple[StoredWeights, ...]
    graphs: Annotated[tuple[Graph, ...], Meta(min_length=1)]
    decoding: Decoding
    chat: ChatFormat | None = None
    classes: Classes | None = None
    files: dict[FileName, File]
    calibration: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for file in (*(graph.file for graph in self.graphs), self.decoding.sampling_graph, TOKENIZER):
            if file is not None and file not in self.files:
                raise ValueError(f"files has no {file}, which is needed")
        if self.task == "text-classification" and self.classes is None:
            raise ValueError("classes is missing, which text-classification needs")

    def write(self, bundle: Path) -> None:
        """Writes manifest.json into `bundle`."""
        values = dataclasses.asdict(self)
        if not self.decoding.clean_up_tokenization_spaces:  # a key of the few tokenizers that want it
            del values["decoding"]["clean_up_tokenization_spaces"]
        if self.calibration is None:
            del values["calibration"]
        for group in values["weights"]:
            if group["layout"] == "rows":  # what it was before there was another
                del group["layout"]
        _write(bundle, values)


def read_manifest(bundle: Path) -> Manifest:
    """Reads `bundle`/manifest.json, of this format or of version 1; keys that it does not know are ignored.

    Raises:
        BundleError: there is no bundle here, or its manifest is damaged or of a newer format.
    """
    raw, path = _read(bundle), bundle / MANIFEST
    version = raw.get("format_version")
    if version is True or version not in (1, FORMAT_VERSION):
        raise BundleError(
            f"{path}: format_version is {brief(version)}, this release reads 1 to {FORMAT_VERSION}; upgrade phimoe-onnx"
        )
    try:
        return msgspec.convert(raw if version == FORMAT_VERSION else bundle_v1.upgrade(raw), Manifest)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at ")
        for pattern, words in _WORDS.items():
            what = what.replace(f"`str` matching regex {pattern!r}", words)
        where = place.replace("`", "").replace("$.", "").replace("$", "")
        raise BundleError(f"{path}: is damaged ({where}: {what}); export the bundle again") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BundleError(
            f"{path}: is damaged (it holds {half!r}, half a character); export the bundle again"
        ) from None


def record(bundle: Path, key: str, value: Any) -> None:
    """Sets one key of `bundle`/manifest.json and leaves every other as it is, those that no one here knows, too.

    Raises:
        BundleError: the file cannot be written, or is a link into somebody else's store, as a hub's cache makes them.
    """
    path = bundle / MANIFEST
    if path.is_symlink():
        raise BundleError(
            f"{path}: is a link to {path.resolve()}, which is left as it is; copy the bundle to change it"
        )
    try:
        _write(bundle, _read(bundle) | {key: value})
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror})") from None


def _read(bundle: Path) -> dict[str, Any]:
    try:
        return read_json(bundle / MANIFEST)
    except ConfigError as error:
        raise BundleError(f"not a bundle of phimoe-export: {error}") from None


def _write(bundle: Path, values: dict[str, Any]) -> None:
    draft = bundle / f".{MANIFEST}"  # renamed in one step, so that a reader never sees half of it
    if draft.is_file() and not draft.is_symlink():
        draft.unlink()  # of a run that was killed
    with draft.open("x", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    draft.replace(bundle / MANIFEST)


def check_files(
    bundle: Path,
    manifest: Manifest,
    *,
    hash_everything: bool = False,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Holds every file against the manifest: its size always, its SHA-256 up to `HASH_LIMIT` bytes or when asked.

    `advance` is called with the bytes just read.

    Raises:
        BundleError: a file is missing, or is not the one that was exported.
    """
    for name, expected in manifest.files.items():
        path = bundle / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:  # such as a name that is too long
            size = None
        if size is None:
            raise BundleError(f"{path}: is missing; the bundle is incomplete, copy or export it again")
        if size != expected.size:
            raise BundleError(
                f"{path}: has {size} bytes, the manifest says {expected.size}; copy or export the bundle again"
            )
        if (hash_everything or size <= HASH_LIMIT) and sha256(path, advance) != expected.sha256:
            raise BundleError(
                f"{path}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again"
            )


@contextlib.contextmanager
def unchanged(bundle: Path) -> Iterator[Manifest]:
    """The manifest, for a block that opens the bundle's files by their names: they are all of one bundle then.

    Raises:
        BundleError: as `read_manifest`; or by the end of the block other files have these names, and whatever the block
            itself raised may come of that.
    """
    manifest = read_manifest(bundle)
    before = _identities(bundle, manifest)
    try:
        yield manifest
    except Exception as error:
        _check_unchanged(bundle, manifest, before, error)
        raise
    _check_unchanged(bundle, manifest, before)


def _check_unchanged(
    bundle: Path, manifest: Manifest, before: list[tuple[int, ...]], cause: Exception | None = None
) -> None:
    try:
        same = read_manifest(bundle).files == manifest.files  # parity may have come meanwhile
    except BundleError:
        same = False
    if not same or _identities(bundle, manifest) != before:
        raise BundleError(f"{bundle}: was changed while it was read; try again") from cause


def _identities(bundle: Path, manifest: Manifest) -> list[tuple[int, ...]]:
    """What tells each of the manifest's files from another of the same name; () for none."""
    identities: list[tuple[int, ...]] = []
    for name in manifest.files:
        try:
            status = (bundle / name).stat()
        except OSError:
            identities.append(())
        else:
            identities.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return identities


def describe_files(bundle: Path, advance: Callable[[int], None] | None = None) -> dict[str, File]:
    """Every file in `bundle` but the manifest, by name; `advance` is called with the bytes just read."""
    paths = _files(bundle)
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # hashlib lets other threads run
        hashes = workers.map(lambda path: sha256(path, advance), paths)
        return {path.name: File(path.stat().st_size, hash) for path, hash in zip(paths, hashes, strict=True)}


def _files(bundle: Path) -> list[Path]:
    return [
        path
        for path in sorted(bundle.iterdir())
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    ]
