"""Finds a checkpoint: a local folder, or a model of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from phimoe_onnx.errors import CheckpointError
from phimoe_onnx.exporter.checkpoint import Stored, read_headers

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of `source`; a hub id is downloaded first, only the files that are needed, and resumes.

    Raises:
        CheckpointError: there is no such folder and no such model, or the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source}: is a file, expected the folder of a checkpoint")
    text = str(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(f"{source}: no such folder, and no hub id of the form owner/name either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, token=token, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: no such folder, and the hub gave no model of this name ({reason})") from None


def headers(source: str | Path, revision: str | None = None, token: str | None = None) -> tuple[Path, dict[str, Stored]]:
    """The folder with config.json and every tensor's entry, of a local folder or of a hub id whose weights are not downloaded.

    Raises:
        CheckpointError: as for `resolve` and `read_headers`.
    """
    folder = resolve(source, revision, token)
    return folder, read_headers(folder)
