"""A checkpoint on the Hugging Face hub: first its small files, then, when these are known to fit, its weights.

Everything lies in the hub's own cache and is shared with other programs. huggingface_hub is imported where it is
needed: a local folder does not need it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from phimoe_onnx.checkpoint.tensors import Stored
from phimoe_onnx.errors import CheckpointError
from phimoe_onnx.files import sha256
from phimoe_onnx.progress import Progress, counter

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

STREAMS = 4  # shards that are downloaded at once


def snapshot(model: str, files: Sequence[str], revision: str | None, token: str | None) -> Path:
    """Downloads those of `files` that the model has; their folder is named after the commit.

    Raises:
        CheckpointError: the hub does not know the model or the revision, does not let us in, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _one_sentence(model, revision), _no_bars():
        return Path(snapshot_download(model, revision=revision, token=token, allow_patterns=list(files)))


def headers(model: str, shards: Sequence[str], folder: Path, token: str | None) -> dict[str, Stored]:
    """Every tensor's entry, from the beginning of each shard.

    Args:
        model: its hub id.
        shards: names of the safetensors files.
        folder: what `snapshot` gave.
        token: for the hub.

    Raises:
        CheckpointError: as for `snapshot`, or the model lacks a shard.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)

    def entries(shard: str) -> dict[str, Stored]:
        tensors = api.parse_safetensors_file_metadata(model, shard, revision=folder.name).tensors
        return {name: Stored(folder / shard, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    with _one_sentence(model), ThreadPoolExecutor(STREAMS) as workers:
        return {name: stored for shard in workers.map(entries, shards) for name, stored in shard.items()}


def fetch(model: str, shards: Sequence[str], folder: Path, token: str | None, report: Progress) -> None:
    """Downloads shards into `folder`, several at once. Arguments and errors are those of `headers`.

    huggingface_hub itself begins an interrupted file anew (from 1.18 on); this goes on where it was, with the bytes
    checked by the SHA-256 that the hub gives.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    missing = [shard for shard in shards if not (folder / shard).exists()]
    stop = Event()
    with _one_sentence(model), _no_bars(), ThreadPoolExecutor(STREAMS) as workers:
        urls = [hf_hub_url(model, shard, revision=folder.name) for shard in missing]
        metadata = [get_hf_file_metadata(url, token=token) for url in urls]
        advance = counter(report, "downloading", sum(each.size or 0 for each in metadata))
        running = [
            workers.submit(_fetch, model, shard, url, each, folder, token, advance, stop)
            for shard, url, each in zip(missing, urls, metadata, strict=True)
        ]
        try:
            for future in as_completed(running):
                future.result()
        finally:
            stop.set()  # the others, after an error or an interrupt
            workers.shutdown(cancel_futures=True)


def _fetch(
    model: str,
    shard: str,
    url: str,
    metadata: HfFileMetadata,
    folder: Path,
    token: str | None,
    advance: Callable[[int], None],
    stop: Event,
) -> None:
    """Downloads one file to where the hub's cache keeps its content, under its lock, and lets the hub link it into
    `folder`.
    """
    from filelock import FileLock
    from huggingface_hub import hf_hub_download
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    repo, etag, size = folder.parents[1], str(metadata.etag), metadata.size or 0
    lock = repo.parent / ".locks" / repo.name / f"{etag}.lock"
    blob = repo / "blobs" / etag
    for path in (lock, blob):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if not blob.exists():
            part = blob.with_name(f"{etag}.incomplete")
            with _Part(part, size, advance, stop) as file:
                http_get(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=build_hf_headers(token=token),
                    expected_size=metadata.size,
                )
            if len(etag) == 64 and sha256(part) != etag:
                part.unlink()
                raise CheckpointError(f"{model}: {shard} was damaged on its way from the hub; run the command again")
            part.rename(blob)
    hf_hub_download(model, shard, revision=folder.name, token=token)


class _Part(io.BufferedWriter):
    """What there is of a file of `size` bytes, open at its end; counts what is written, until it is told to stop."""

    def __init__(self, path: Path, size: int, advance: Callable[[int], None], stop: Event) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.advance, self.stop = advance, stop
        if self.tell() > size:
            self.truncate(self.seek(0))
        advance(self.tell())

    def write(self, data: Any) -> int:
        if self.stop.is_set():
            raise InterruptedError
        self.advance(len(data))
        return super().write(data)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Silences huggingface_hub's progress bars: the export has its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


@contextlib.contextmanager
def _one_sentence(model: str, revision: str | None = None) -> Iterator[None]:
    """Turns whatever goes wrong in huggingface_hub into a CheckpointError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.HFValidationError:
        message = "no such folder, and no hub id of the form owner/name either"
    except errors.GatedRepoError:
        message = (
            f"is gated; ask for access on {constants.ENDPOINT}/{model}, then pass --token of the account that has it"
        )
    except errors.RepositoryNotFoundError:
        message = (
            "no such folder, and the hub has no such model; compare the spelling, "
            "or pass --token if the model is private"
        )
    except errors.RevisionNotFoundError:
        message = f"the hub has no revision {revision!r} of it; --revision takes a branch, a tag or a whole commit hash"
    except Exception as error:  # its HTTP client, whose errors it lets through, changes from release to release
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            message = (
                f"the hub lacks one of its shards, and only whole safetensors checkpoints are read ({_reason(error)})"
            )
        elif getattr(getattr(error, "response", None), "status_code", None) == 401:
            message = "the hub refused the token; pass another --token, or log in anew with `hf auth login`"
        elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            message = f"cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}); "
            message += "make room there, or set HF_HOME to another disk"
        else:
            message = f"is no folder, and could not be downloaded from {constants.ENDPOINT} ({_reason(error)}); "
            message += "run the command again"
    else:
        return
    raise CheckpointError(f"{model}: {message}") from None


def _reason(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0].strip().rstrip(":.") if lines else type(error).__name__
