"""Finds a checkpoint: a local folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from phimoe_onnx.checkpoint import hub
from phimoe_onnx.checkpoint.adapter import CONFIG, Adapter, refuse_adapter
from phimoe_onnx.checkpoint.headers import Stored
from phimoe_onnx.checkpoint.tensors import INDEX, SINGLE, read_headers, shard_files
from phimoe_onnx.config import ARCHITECTURES, PhiMoEConfig
from phimoe_onnx.errors import CheckpointError, ExportError, MissingPackageError
from phimoe_onnx.files import sha256
from phimoe_onnx.progress import Progress

TASKS = tuple(ARCHITECTURES)
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
READ = ("additional_chat_templates/tool_use.jinja",)  # which a bundle has in another form


def resolve(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder with the configuration and the tokenizer of `source`; of a local folder, with its weights as well.

    A model of the hub is downloaded into the hub's cache; `fetch_weights` gets its weights.

    Raises:
        CheckpointError: there is no such folder and no such model, or the hub cannot be reached.
        MissingPackageError: it is a model of the hub, and huggingface_hub is not installed.
        ExportError: a revision of a local folder is asked for.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ExportError(f"--revision {revision} is for a hub id, but {source} is a local folder; leave it out")
        refuse_adapter(Path(source))
        return Path(source)
    if Path(source).exists():
        raise CheckpointError(f"{source}: is a file, expected the folder of a checkpoint")
    model = str(source)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{source}: no such folder, and no hub id of the form owner/name either")
    if find_spec("huggingface_hub") is None:
        raise MissingPackageError(
            f"{source} is a hub id, which needs the package huggingface_hub; pip install 'phimoe-onnx[export]'"
        )
    folder = hub.snapshot(model, [*COPIED, *READ, INDEX, CONFIG], revision, token)
    refuse_adapter(folder)
    return folder


def fetch_weights(source: str | Path, folder: Path, token: str | None, report: Progress) -> None:
    """Downloads the safetensors that the model in `folder` needs, if it is one of the hub, going on where a killed run
    was.

    Raises:
        CheckpointError: the hub lacks a file or cannot be reached, or what came from it is damaged.
    """
    if not Path(source).is_dir():
        hub.fetch(str(source), _hub_shards(str(source), folder, token), folder, token, report)


def headers(
    source: str | Path, revision: str | None = None, token: str | None = None
) -> tuple[Path, dict[str, Stored]]:
    """The folder with config.json, and every tensor's entry; of a model on the hub no weights are downloaded, and one
    whose weights are in the cache is read there.

    Raises:
        CheckpointError, ExportError: as for `resolve` and `checkpoint.read_headers`.
    """
    folder = resolve(source, revision, token)
    if Path(source).is_dir():
        return folder, read_headers(folder)
    shards = _hub_shards(str(source), folder, token)
    if all((folder / shard).exists() for shard in shards):
        return folder, read_headers(folder)
    return folder, hub.headers(str(source), shards, folder, token)


def _hub_shards(model: str, folder: Path, token: str | None) -> list[str]:
    """As `shard_files`, which cannot see whether the hub has an only file that is not downloaded yet."""
    shards = shard_files(folder)
    if all((folder / shard).exists() for shard in shards):
        return shards
    return [SINGLE] if SINGLE in shards or hub.has(model, SINGLE, folder, token) else shards


def origin(source: str | Path, folder: Path, adapter: Adapter | None = None) -> str:
    """What the manifest calls a checkpoint: a local folder's name, or a hub id with its commit; with the folder's name
    of an adapter that is merged into it.
    """
    name = Path(source).resolve().name if Path(source).is_dir() else f"{source}@{folder.name}"
    return name if adapter is None else f"{name} with {adapter.folder.resolve().name}"


def digest(files: Iterable[Path], advance: Callable[[int], None]) -> str:
    """What names the content of some files: the SHA-256 of the lines that `sha256sum` prints of them, in this order."""
    return hashlib.sha256("".join(f"{sha256(file, advance)}  {file.name}\n" for file in files).encode()).hexdigest()


def task_for(config: PhiMoEConfig, task: str | None, source: object) -> str:
    """The task that the checkpoint `source` is used for: the one that is asked for, else the one it was made for.

    Raises:
        ExportError: there is no such task, or the checkpoint lacks the head that it needs.
    """
    if task not in (None, *TASKS):
        raise ExportError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    made_for = config.task or task or "text-generation"
    if task not in (None, made_for, "feature-extraction"):
        served = " or ".join(dict.fromkeys((made_for, "feature-extraction")))
        raise ExportError(f"{source}: was made for {made_for} and has no head for {task}; use --task {served}")
    return task or made_for
