"""Checkpoints from the Hugging Face hub, against tests/hub.py: what is downloaded, how it resumes, and every way it
fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint import source
from phimoe_onnx.checkpoint.tensors import INDEX, SINGLE, read_headers
from phimoe_onnx.cli.export import main
from phimoe_onnx.errors import CheckpointError, ConfigError, ExportError
from phimoe_onnx.exporter import pipeline
from tests.checkpoints import BASE, MODEL
from tests.hub import Files, Hub, read_files

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = sorted([*SHARDS, *source.COPIED, INDEX])
NOT_NEEDED = [
    "pytorch_model.bin",
    "modeling_phimoe.py",
    "configuration_phimoe.py",
    "phimoe-q4.gguf",
    "onnx/model.onnx",
    "onnx/config.json",
    "consolidated.safetensors",
    "model-00003-of-00003.safetensors",
    "vocab.json",
    "banner.png",
    ".gitattributes",
    "LICENSE",
]
AUTO_MAP = {
    "AutoConfig": "configuration_phimoe.PhiMoEConfig",
    "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
}


def published() -> Files:
    """The small model as a repository of the hub: with code of its own, and weights in every other format."""
    files = read_files(MODEL)
    config = json.loads(files["config.json"]) | {"auto_map": AUTO_MAP}
    never = {name: f"raise SystemExit('{name} must never run')".encode() for name in NOT_NEEDED}
    return files | never | {"config.json": json.dumps(config).encode(), "chat_template.jinja": b"{{ messages }}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with the small model as owner/name, and an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    first, second = published(), published()
    second["config.json"] = json.dumps(BASE | {"model_type": "mixtral"}).encode()
    with Hub({"a" * 40: first, "b" * 40: second}, {"main": "a" * 40, "v1": "a" * 40, "other": "b" * 40}) as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "DOWNLOAD_CHUNK_SIZE": 1 << 16,  # 10 MB are more than the small model's shards
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def download(
    revision: str | None = None, token: str | None = None, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Path:
    """The folder of owner/name with everything in it."""
    folder = source.resolve("owner/name", revision, token)
    source.fetch_weights("owner/name", folder, token, progress)
    return folder


def test_a_bundle_from_the_hub_is_that_of_the_local_folder(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for name in NEEDED:
        (local / name).write_bytes(hub.commits["a" * 40][name])
    assert main(["owner/name", "--quantize", "int4"]) == 0
    assert capsys.readouterr().out.startswith("name-cpu-int4: ")
    assert hub.downloaded() == NEEDED
    pipeline.export(local, "local-int4", quantize="int4")
    here, there = read_manifest(Path("local-int4")), read_manifest(Path("name-cpu-int4"))
    assert there.source == "owner/name@" + "a" * 40
    assert dataclasses.replace(there, source=here.source) == here
    hub.requests.clear()
    assert main(["owner/name", "--quantize", "int4", "--overwrite"]) == 0
    assert hub.downloaded() == []


def test_nothing_but_what_is_needed_is_downloaded_and_nothing_of_it_runs(hub: Hub) -> None:
    folder = download()
    assert hub.downloaded() == NEEDED
    assert sorted(path.name for path in folder.iterdir()) == NEEDED
    assert all((folder / name).read_bytes() == hub.commits["a" * 40][name] for name in NEEDED)
    assert not [request for request in hub.requests if request.path.endswith(".py")]


def test_a_single_file_has_no_index(hub: Hub) -> None:
    files = hub.commits["a" * 40]
    files[SINGLE] = save({"lm_head.bias": torch.ones(4)})
    del files[INDEX]
    download()
    assert [name for name in hub.downloaded() if name.endswith("safetensors")] == [SINGLE]


def test_the_only_file_goes_before_an_index(hub: Hub) -> None:
    """As transformers has it; the index may be that of an older save."""
    files = hub.commits["a" * 40]
    files[SINGLE] = save({"lm_head.bias": torch.ones(4)})
    folder = download()
    assert [name for name in hub.downloaded() if name.endswith("safetensors")] == [SINGLE]
    assert {stored.file for stored in read_headers(folder).values()} == {folder / SINGLE}


def test_an_adapter_beside_the_weights(hub: Hub) -> None:
    files = hub.commits["a" * 40]
    files["adapter_config.json"] = json.dumps({"base_model_name_or_path": "owner/base"}).encode()
    with pytest.raises(CheckpointError, match="an adapter lies beside the weights"):
        download()


def test_the_weights_wait_until_all_else_fits(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["owner/name", "--quantize", "int4", "--block-size", "256"]) == 1
    assert "--block-size is 256" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="model_type is 'mixtral'"):
        pipeline.export("owner/name", revision="other")
    Path("bundle").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        pipeline.export("owner/name", "bundle")
    assert not [name for name in hub.downloaded() if name.endswith("safetensors")]


def test_a_plan_reads_headers_alone(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["owner/name", "--plan"]) == 0
    assert capsys.readouterr().out.startswith("owner/name: PhiMoE, 4.7 M parameters\n")
    fetched = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert fetched
    assert all(request.range for request in fetched)
    folder, stored = source.headers("owner/name")
    assert folder == download()
    assert stored == read_headers(folder)


def test_a_plan_of_what_is_in_the_cache_needs_no_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = download()
    hub.stop()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["owner/name", "--plan"]) == 0
    assert capsys.readouterr().out.startswith("owner/name: PhiMoE, 4.7 M parameters\n")
    assert source.headers("owner/name") == (folder, read_headers(folder))
    (folder / SHARDS[1]).unlink()
    assert main(["owner/name", "--plan"]) == 1
    assert "offline mode is enabled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, "a"), ("main", "a"), ("v1", "a"), ("other", "b"), ("b" * 40, "b")]
)
def test_a_revision(hub: Hub, revision: str | None, commit: str) -> None:
    folder = download(revision)
    assert folder.name == commit * 40
    assert (folder / "config.json").read_bytes() == hub.commits[commit * 40]["config.json"]


def test_a_token_reaches_the_hub_and_nobody_else(hub: Hub) -> None:
    hub.token = "secret"
    download(token="secret")
    assert hub.downloaded() == NEEDED
    for request in hub.requests:
        assert request.authorization == (None if request.path.startswith("/cdn/") else "Bearer secret")


def test_progress_counts_the_bytes_of_the_weights(hub: Hub) -> None:
    calls: list[tuple[str, int, int]] = []
    download(progress=lambda *call: calls.append(call))
    total = sum(len(hub.commits["a" * 40][shard]) for shard in SHARDS)
    assert {(phase, whole) for phase, _, whole in calls} == {("downloading", total)}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == total


def test_a_broken_connection_is_taken_up_again(hub: Hub) -> None:
    hub.cut = {SHARDS[1]: [1_000_000]}
    folder = download()
    assert (folder / SHARDS[1]).read_bytes() == hub.commits["a" * 40][SHARDS[1]]
    assert ranges(hub, SHARDS[1])[0] is None
    assert 900_000 < int(ranges(hub, SHARDS[1])[1]) <= 1_000_000


def test_the_next_run_goes_on_where_one_was_killed(hub: Hub) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(progress=interrupt)
    left = {path.name.removesuffix(".incomplete"): path.stat().st_size for path in Path("cache").rglob("*.incomplete")}
    assert sum(left.values()) > 2_000_000
    hub.requests.clear()
    folder = download()
    for shard in SHARDS:
        data = hub.commits["a" * 40][shard]
        assert (folder / shard).read_bytes() == data
        assert [int(start or 0) for start in ranges(hub, shard)] == [left.get(hashlib.sha256(data).hexdigest(), 0)]
    assert not list(Path("cache").rglob("*.incomplete"))


def test_a_damaged_download_is_not_used(hub: Hub) -> None:
    data = hub.commits["a" * 40][SHARDS[0]]
    blobs = Path("cache/models--owner--name/blobs")
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.incomplete").write_bytes(bytes(1000))
    with pytest.raises(
        CheckpointError, match=rf"^owner/name: {SHARDS[0]} was damaged on its way from the hub; run the command again$"
    ):
        download()
    assert (download() / SHARDS[0]).read_bytes() == data


def test_a_download_that_is_too_long_is_begun_anew(hub: Hub) -> None:
    data = hub.commits["a" * 40][SHARDS[0]]
    blobs = Path("cache/models--owner--name/blobs")
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.incomplete").write_bytes(data + b"more")
    assert (download() / SHARDS[0]).read_bytes() == data


def ranges(hub: Hub, name: str) -> list[Any]:
    """Where each download of a large file began, None for a request without a range."""
    path = f"/cdn/{hashlib.sha256(hub.commits['a' * 40][name]).hexdigest()}"
    found = [request.range for request in hub.requests if request.method == "GET" and request.path == path]
    return [range and range.removeprefix("bytes=").split("-")[0] for range in found]


def gated(hub: Hub) -> None:
    hub.gated = True


def failing(hub: Hub) -> None:
    hub.failing = True


def private(hub: Hub) -> None:
    hub.token = "secret"


def without_shard(hub: Hub) -> None:
    del hub.commits["a" * 40][SHARDS[1]]


def without_safetensors(hub: Hub) -> None:
    hub.commits["a" * 40] = {name: data for name, data in published().items() if "safetensors" not in name}


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ["owner/nothing"], "owner/nothing: no such folder, and the hub has no such model; compare the spelling"),
        (None, ["owner/name", "--revision", "v9"], "the hub has no revision 'v9' of it; --revision takes a branch"),
        (None, ["owner/na me"], "no hub id of the form owner/name"),
        (gated, ["owner/name"], "is gated; ask for access on http://127.0.0.1:"),
        (private, ["owner/name"], "or pass --token if the model is private"),
        (private, ["owner/name", "--token", "wrong"], "the hub refused the token; pass another --token"),
        (failing, ["owner/name"], "(Server error '500 Internal Server Error'"),
        (
            without_shard,
            ["owner/name"],
            "the hub lacks one of its shards, and only whole safetensors checkpoints are read (Client error '404",
        ),
        (without_safetensors, ["owner/name"], "only whole safetensors checkpoints are read"),
        (None, [str(MODEL), "--revision", "main"], "--revision main is for a hub id, but"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Hub], None] | None,
    arguments: list[str],
    message: str,
) -> None:
    if prepare:
        prepare(hub)
    assert main([*arguments, "-o", "bundle"]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(Path().glob("*bundle*"))


def test_a_hub_that_is_down(hub: Hub) -> None:
    folder = download()
    hub.stop()
    assert download() == folder  # from the cache
    with pytest.raises(
        CheckpointError, match=r"^owner/name: is no folder, and could not be downloaded from http://127.0.0.1.*refused"
    ):
        download("v1")


def test_without_a_network_by_choice(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"^owner/name: is no folder, and could not be downloaded .*offline mode is enabled"
    ):
        download()
    assert hub.requests == []
