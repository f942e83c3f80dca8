"""A golden file: what is kept of the reference, so that a later check needs neither checkpoint nor PyTorch.

docs/golden.md describes it for readers in any language. It is a safetensors file, read and written with numpy alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from phimoe_onnx.bundle import Manifest
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import GoldenError, PhiMoEError
from phimoe_onnx.parity.comparison import Comparison, pieces

FORMAT_VERSION = 1
TOP = 64  # logits that are kept of each token: the largest of the reference
SAMPLED = 32  # and so many that are spread over the vocabulary
MARK = '{"__metadata__":{"written_by":"phimoe-verify"'  # in the beginning of every such file
DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4", "I16": "<i2"}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What is known of PyTorch over the weights that one bundle stores.

    Attributes:
        files: SHA-256 of the bundle's files of weights; the `stored_*` arrays hold for bundles with the same.
        scales: as those of the reference.
        perplexity: of text-generation.
        routing_agreement: as in `Report`.
        to_reference: `Report.stored_to_reference`.
    """

    files: dict[str, str]
    scales: tuple[float, ...]
    perplexity: float | None
    routing_agreement: float
    to_reference: Comparison


@dataclass(frozen=True, kw_only=True)
class Header:
    """What stands in a golden file beside its arrays.

    Attributes:
        checkpoint: the folder's name.
        checkpoint_sha256: see `checkpoint.source.digest`; `adapter_sha256` likewise, None without one.
        config: `PhiMoEConfig` as an object.
        windows: how many tokens each window or text has.
        scales: the standard deviation of the reference's outputs, a window; of other tasks one for all texts.
        perplexity: the reference's; of text-generation.
        new_tokens: how many tokens a greedy continuation was to have.
        stored: None where the weights of the bundle that the file was saved with are not rounded.
    """

    format_version: int = FORMAT_VERSION
    tool_version: str
    task: str
    checkpoint: str
    checkpoint_sha256: str
    adapter_sha256: str | None
    config: dict[str, Any]
    windows: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(min_length=1)]
    scales: Annotated[tuple[float, ...], Meta(min_length=1)]
    perplexity: float | None
    new_tokens: Annotated[int, Meta(ge=0)]
    stored: Stored | None


@dataclass(frozen=True)
class Golden:
    """A golden file's header and its arrays by name."""

    header: Header
    arrays: Arrays

    def windows(self) -> list[list[int]]:
        """The token ids of each window or text."""
        ends = np.cumsum(self.header.windows)
        return [part.tolist() for part in np.split(self.arrays["token_ids"], ends[:-1])]

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            PhiMoEError: it cannot be written.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        arrays = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))  # so that each is aligned
        text = json.dumps(dataclasses.asdict(self.header), separators=(",", ":"))
        digest = hashlib.sha256(text.encode())
        entries: dict[str, Any] = {"__metadata__": {"written_by": "phimoe-verify", "golden": text, "sha256": ""}}
        offset = 0
        for name, array in arrays.items():
            dtype = next(dtype for dtype, code in DTYPES.items() if array.dtype == np.dtype(code))
            offsets = [offset, offset + array.nbytes]
            entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
            digest.update(array.tobytes())
            offset = offsets[1]
        entries["__metadata__"]["sha256"] = digest.hexdigest()
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        try:
            path.write_bytes(
                b"".join([struct.pack("<Q", len(header)), header, *(a.tobytes() for a in arrays.values())])
            )
        except OSError as error:
            raise PhiMoEError(f"{path}: cannot be written ({error.strerror})") from None


def read_golden(path: Path) -> Golden:
    """Reads and checks a golden file.

    Raises:
        GoldenError: it is missing, damaged, of a newer format, or no golden file.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device has no end
        raise GoldenError(f"{path}: cannot be read (it is no regular file)")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GoldenError(f"{path}: cannot be read ({error.strerror})") from None
    if data.startswith(b"version https://git-lfs"):
        raise GoldenError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in that folder")
    if MARK.encode() not in data[: 8 + len(MARK)]:
        raise GoldenError(f"{path}: is no golden file; phimoe-verify --save-golden writes one")
    try:
        text, arrays, whole = _parse(data)
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            raise GoldenError(
                f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}; upgrade phimoe-onnx"
            )
        header = msgspec.convert(json.loads(text), Header)
        problem = None if whole else "its SHA-256 is not the one that it says"
        problem = problem or _problem(header, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise GoldenError(f"{path}: is damaged ({error}); save it again with --save-golden") from None
    if problem:
        raise GoldenError(f"{path}: is damaged ({problem}); save it again with --save-golden")
    return Golden(header, arrays)


def _parse(data: bytes) -> tuple[str, Arrays, bool]:
    """The header's text, the arrays, and whether the file's SHA-256 is the one that it says."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:end])
    metadata = entries.pop("__metadata__")
    numbers, arrays = memoryview(data)[end:], {}
    for name, entry in entries.items():
        dtype, (first, last) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
        arrays[name] = np.frombuffer(numbers[first:last], dtype).reshape(entry["shape"])
    digest = hashlib.sha256(metadata["golden"].encode())
    digest.update(numbers)
    return metadata["golden"], arrays, digest.hexdigest() == metadata["sha256"]


def _problem(header: Header, arrays: Arrays) -> str | None:
    """What the file lacks, by the sizes that its header tells."""
    config, tokens = header.config, sum(header.windows)
    vocab, layers = int(config["vocab_size"]), int(config["num_hidden_layers"])
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_ids": ("I32", (tokens,)),
        "routing": ("I16", (layers, tokens, 2)),
    }
    if header.task == "text-generation":
        top, sampled, units = (tokens, min(TOP, vocab)), (tokens, min(SAMPLED, vocab)), len(header.windows)
        expected["greedy"] = ("I32", arrays["greedy"].shape[:1])
        expected["top_ids"] = ("I32", top)
        for kind in ("", "stored_") if header.stored else ("",):
            expected[f"{kind}top_logits"], expected[f"{kind}sampled_logits"] = ("F32", top), ("F32", sampled)
            expected[f"{kind}logsumexp"] = ("F64", (tokens,))
        if header.stored:
            expected["stored_best"] = ("I32", (tokens,))
    else:
        width = len(config["labels"]) if header.task == "text-classification" else int(config["hidden_size"])
        units = 1
        for kind in ("", "stored_") if header.stored else ("",):
            expected[f"{kind}outputs"] = ("F32", (len(header.windows), width))
    if (header.task == "text-generation") != (header.perplexity is not None):
        return f"perplexity is {header.perplexity} of {header.task}"
    if header.perplexity is not None and not header.perplexity > 0:
        return f"perplexity is {header.perplexity}, expected a positive number"
    for name, (dtype, shape) in expected.items():
        found = arrays[name]
        if found.dtype != np.dtype(DTYPES[dtype]) or found.shape != shape:
            return f"{name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
    for name in ("token_ids", "greedy", "top_ids", "stored_best"):
        if name in expected and arrays[name].size and not 0 <= arrays[name].min() <= arrays[name].max() < vocab:
            return f"{name} holds ids outside the vocabulary of {vocab}"
    for scales in (header.scales, header.stored.scales if header.stored else header.scales):
        if len(scales) != units or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            return f"scales are {list(scales)[:4]}, expected {units} positive numbers"
    return None


def as_object(config: PhiMoEConfig) -> dict[str, Any]:
    """A configuration as plain values of JSON, without what does not tell two models apart."""
    fields = {field.name for field in dataclasses.fields(PhiMoEConfig) if field.compare}
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name in fields}


def weights_of(manifest: Manifest) -> dict[str, str]:
    """The SHA-256 of a bundle's files of weights."""
    return {name: file.sha256 for name, file in manifest.files.items() if name.endswith(".data")}


def columns(first: int, tokens: int, vocab: int) -> NDArray[np.int64]:
    """Which logits are sampled of each token, [tokens, min(SAMPLED, vocab)], from the token `first` of a file on.

    Those of a token are evenly apart, and move on by one from token to token, so that every column has its turn.
    """
    count = min(SAMPLED, vocab)
    each = first + np.arange(tokens)[:, None] + np.arange(count) * (vocab // count)
    return each % vocab


def top_ids(logits: NDArray[np.float32]) -> NDArray[np.int32]:
    """The ids of the largest logits [S, V], the largest first, of equal ones the lower id: [S, min(TOP, V)]."""
    count = min(TOP, logits.shape[-1])
    parts = []
    for rows in pieces(len(logits)):
        kept = np.sort(np.argpartition(-logits[rows], count - 1, axis=-1)[:, :count], axis=-1)
        order = np.argsort(-np.take_along_axis(logits[rows], kept, axis=-1), axis=-1, kind="stable")
        parts.append(np.take_along_axis(kept, order, axis=-1))
        parts[-1][:, 0] = logits[rows].argmax(axis=-1)
    return np.concatenate(parts).astype(np.int32)


def seen(logits: NDArray[np.float32], ids: NDArray[np.int32], first: int) -> Arrays:
    """What a file keeps of the logits [S, V] of a window that begins at its token `first`."""
    return {
        "top_logits": np.take_along_axis(logits, ids.astype(np.int64), axis=-1),
        "sampled_logits": np.take_along_axis(logits, columns(first, *logits.shape), axis=-1),
        "logsumexp": np.concatenate([_logsumexp(logits[rows].astype(np.float64)) for rows in pieces(len(logits))]),
        "best": logits.argmax(axis=-1).astype(np.int32),
    }


def compare(
    comparison: Comparison,
    logits: NDArray[np.float32],
    kept: Arrays,
    ids: NDArray[np.int32],
    first: int,
    scale: float,
) -> NDArray[np.float64]:
    """Adds a window's logits [S, V] to a comparison with those of which `seen` kept something.

    Of all logits but the top and the sampled ones the sum of probabilities alone is known, of both sides. So `kl` is
    exact for the top ones. For all others it is estimated from the sampled ones, without bias: with r and s, the sums
    of the others' p and q, the sum of p log(p / q) over them is that of p log(p / q) - p + q, of which no term is
    negative, and r - s. `mean_difference` is that of the sampled logits, `max_difference` the largest among these and
    the top ones.

    Returns:
        The KL divergence of each token, [S].
    """
    divergences = [np.empty(0)]
    for rows in pieces(len(logits)):
        got = logits[rows].astype(np.float64)
        top, where = ids[rows].astype(np.int64), columns(first + rows.start, len(got), got.shape[-1])
        near = np.abs(np.take_along_axis(got, top, axis=-1) - kept["top_logits"][rows])
        apart = np.abs(np.take_along_axis(got, where, axis=-1) - kept["sampled_logits"][rows])
        log_q = got - _logsumexp(got)[:, None]
        log_p = kept["top_logits"][rows] - kept["logsumexp"][rows][:, None]
        kl = (np.exp(log_p) * (log_p - np.take_along_axis(log_q, top, axis=-1))).sum(axis=-1)
        q = np.exp(log_q)
        np.put_along_axis(q, top, 0.0, axis=-1)
        kl += 1 - np.exp(log_p).sum(axis=-1) - q.sum(axis=-1)
        log_p = kept["sampled_logits"][rows] - kept["logsumexp"][rows][:, None]
        log_q = np.take_along_axis(log_q, where, axis=-1)
        others = ~(where[:, :, None] == top[:, None, :]).any(axis=-1)
        terms = np.exp(log_p) * (log_p - log_q - 1) + np.exp(log_q)
        kl += np.where(others, terms, 0.0).sum(axis=-1) * got.shape[-1] / where.shape[-1]
        divergences.append(kl)
        values = {
            "mean_difference": apart / scale,
            "kl": kl,
            "top1_agreement": got.argmax(axis=-1) == kept["best"][rows],
        }
        comparison.take(len(got), float(np.maximum(near.max(), apart.max()) / scale), values)
    return np.concatenate(divergences)


def _logsumexp(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    largest = logits.max(axis=-1)
    result: NDArray[np.float64] = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    return result
