"""Finds a checkpoint: a local folder, or a model of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phimoe_onnx.errors import CheckpointError
from phimoe_onnx.exporter.checkpoint import Stored, read_headers

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of `source`; a hub id is downloaded first, only the files that are needed, and resumes.

    Raises:
        CheckpointError: there is no such folder and no such model, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with _hub_errors(source):
        return Path(snapshot_download(_hub_id(source), revision=revision, token=token, allow_patterns=PATTERNS))


def headers(source: str | Path, revision: str | None = None, token: str | None = None) -> tuple[Path, dict[str, Stored]]:
    """The folder with config.json, and every tensor's entry; of a model on the hub no weights are downloaded.

    Raises:
        CheckpointError: as for `resolve` and `checkpoint.read_headers`.
    """
    if Path(source).is_dir():
        return Path(source), read_headers(Path(source))
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    repo = _hub_id(source)
    with _hub_errors(source):
        config = hf_hub_download(repo, "config.json", revision=revision, token=token)
        shards = get_safetensors_metadata(repo, revision=revision, token=token).files_metadata
    tensors = ((Path(file), name, tensor) for file, shard in shards.items() for name, tensor in shard.tensors.items())
    return Path(config).parent, {name: Stored(file, tensor.dtype, tuple(tensor.shape)) for file, name, tensor in tensors}


def _hub_id(source: str | Path) -> str:
    text = str(source)
    if Path(source).exists():
        raise CheckpointError(f"{source}: is a file, expected the folder of a checkpoint")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(f"{source}: no such folder, and no hub id of the form owner/name either")
    return text


@contextmanager
def _hub_errors(source: str | Path) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, NotASafetensorsRepoError

    try:
        yield
    except NotASafetensorsRepoError:
        raise CheckpointError(f"{source}: holds no safetensors on the hub; only safetensors checkpoints are read") from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: no such folder, and the hub gave no model of this name ({reason})") from None
