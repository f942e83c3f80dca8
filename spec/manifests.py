"""Changes of the bundle in this folder that a reader takes, and those that it refuses: the cases of make_cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Fields = dict[str, Any]
Steps = list[list[Any]]  # as embedding.md says, "Holding a runtime to it"
GRAPHS = ("model.onnx", "model.branches.onnx")


def taken(prompt: Fields) -> Iterator[Fields]:
    """Cases of changed manifests that give the tokens of `prompt`, a case whose bundle is unchanged."""

    def case(name: str, *steps: list[Any]) -> Fields:
        return {**prompt, "name": name, "bundle": steps, "load": {}}

    branches = {"file": "model.branches.onnx", "devices": {"cpu": "1.29"}, "optional_inputs": []}
    yield case(
        "keys that nobody knows",
        ["set", "/comment", {"a": [1, None]}],
        ["set", "/graphs/0/comment", "a"],
        ["set", "/graphs/1/devices/tpu", "3"],
        ["set", "/decoding/comment", 1.5],
        ["set", "/decoding/cache/comment", True],
        ["set", "/files/config.json/comment", []],
        ["set", "/chat/comment", "a"],
    )
    yield case("requires nothing", ["set", "/graphs/0/requires", []], ["set", "/graphs/1/requires", []])
    needy = {"file": "config.json", "devices": {"cpu": "1.0"}, "optional_inputs": [], "requires": ["operators/9"]}
    yield case("a graph for operators that nobody has is passed over", ["set", "/graphs/0", needy])
    other = {"file": "config.json", "devices": {"tpu": "1.0"}, "optional_inputs": []}
    yield case("a graph for another device is passed over", ["set", "/graphs/0", other])
    newer = {"file": "config.json", "devices": {"cpu": "99.1"}, "optional_inputs": []}
    yield case("a graph for a newer ONNX Runtime is passed over", ["set", "/graphs/0", newer])
    yield case("nothing that is for people", *(["remove", f"/{key}"] for key in ("parity", "classes")))
    yield case("releases by number", ["set", "/graphs", [branches | {"devices": {"cpu": "1.9"}}]])
    yield case("a context of the prompt and its tokens", ["set", "/decoding/context", 1000])
    yield case(
        "a bundle of version 1",
        ["set", "/format_version", 1],
        ["set", "/weights", {"experts": "int4, block 32", "router": "float32", "norms": "float32"}],
        ["remove", "/recipe"],
        ["remove", "/decoding/sampling_graph"],
        ["remove", "/graphs/0/devices"],
        ["set", "/graphs/0/minimum_onnxruntime", "1.31"],
        ["remove", "/graphs/1/devices"],
        ["set", "/graphs/1/minimum_onnxruntime", "1.29"],
    )


def refused() -> dict[str, tuple[str, tuple[str, ...], Steps]]:
    """An error's name -> its kind, what its message names, and the changes that lead to it."""
    damaged = _structure() | _decoding() | _contradictions()
    errors = {name: ("BundleError", ("manifest.json", key), steps) for name, (key, steps) in damaged.items()}
    for version in (3, "2", True, None):
        errors[f"the format {version!r}"] = (
            "BundleError",
            ("manifest.json", "format_version"),
            _set("/format_version", version),
        )
    errors["no format"] = ("BundleError", ("manifest.json", "format_version"), [["remove", "/format_version"]])
    errors["another task"] = ("BundleError", ("translation", "text-generation"), _set("/task", "translation"))
    above = [["replace all", graph, "model.data", "../el.data"] for graph in GRAPHS]
    unlisted = [["replace all", graph, "model.data", "other.data"] for graph in GRAPHS]
    damage = [["replace", graph, "\b", "\u007f"] for graph in GRAPHS]
    listed = [["list", graph] for graph in GRAPHS]
    copied = ["copy", "model.data", "other.data"]
    errors["weights in a file above the folder"] = ("BundleError", ("../el.data",), [*above, *listed])
    errors["weights in a file that is not listed"] = ("BundleError", ("other.data",), [copied, *unlisted, *listed])
    errors["a damaged graph"] = ("BundleError", (".onnx",), [*damage, *listed])
    device = [["set", "/decoding/cache/dtype", "bfloat16"], ["set", "/dtype", "bfloat16"], ["set", "/target", "cuda"]]
    errors["for another device"] = ("DeviceError", ("cuda",), [*_graph(devices={"cuda": "1.31"}), *device])
    errors["for a newer ONNX Runtime"] = ("DeviceError", ("99.1",), _graph(devices={"cpu": "99.1"}))
    errors["for operators that nobody has"] = ("DeviceError", ("operators/9",), _graph(requires=["operators/9"]))
    errors["a graph that ONNX Runtime refuses"] = ("DeviceError", ("config.json",), _graph(file="config.json"))
    return errors


def _structure() -> dict[str, tuple[str, Steps]]:
    """Manifests whose graphs, files or chat are not as they must be: a name -> the key at fault and the changes."""
    return {
        "no graphs": ("graphs", _set("/graphs", [])),
        "graphs that are no list": ("graphs", _set("/graphs", {})),
        "a graph that is no object": ("graphs", _set("/graphs/0", None)),
        "a graph on no device": ("devices", _graph(devices={})),
        "a release that is none": ("devices", _graph(devices={"cpu": "latest"})),
        "a release that is a number": ("devices", _graph(devices={"cpu": 1.29})),
        "a release of 5,000 digits": ("devices", _graph(devices={"cpu": "9" * 5000})),
        "requires that is a text": ("requires", _graph(requires="phimoe-operators/1")),
        "requires a number": ("requires", _graph(requires=[1])),
        "optional inputs that are a text": ("optional_inputs", _graph(optional_inputs="rope_length")),
        "a graph that is not listed": ("other.onnx", _graph(file="other.onnx")),
        "a tokenizer that is not listed": ("tokenizer.json", [["remove", "/files/tokenizer.json"]]),
        "no files": ("files", [["remove", "/files"]]),
        "files that are a list": ("files", _set("/files", [])),
        "a file without a size": ("files", [["remove", "/files/config.json/size"]]),
        "a size that is a text": ("files", _set("/files/config.json/size", "1538")),
        "a negative size": ("files", _set("/files/config.json/size", -1)),
        "a hash that is too short": ("files", _set("/files/config.json/sha256", "0a94")),
        "a hash that is no number": ("files", _set("/files/config.json/sha256", "g" * 64)),
        "a file above the folder": ("files", _set("/files/..~1secret", {"size": 1, "sha256": "0" * 64})),
        "a file in a folder": ("files", _set("/files/a~1b", {"size": 1, "sha256": "0" * 64})),
        "a file in a folder of Windows": ("files", _set("/files/a\\b", {"size": 1, "sha256": "0" * 64})),
        "a file that is the folder above": ("files", _set("/files/..", {"size": 1, "sha256": "0" * 64})),
        "a file without a name": ("files", _set("/files/", {"size": 1, "sha256": "0" * 64})),
        "a chat that is a text": ("chat", _set("/chat", "chatml")),
        "a turn of one text": ("chat", _set("/chat/turns/user", ["<|user|>"])),
        "a turn of numbers": ("chat", _set("/chat/turns/user", [1, 2])),
        "a chat without generation": ("chat", [["remove", "/chat/generation"]]),
    }


def _decoding() -> dict[str, tuple[str, Steps]]:
    """As `_structure`, of the decoding section."""
    damaged: dict[str, tuple[str, Steps]] = {
        "no decoding": ("decoding", [["remove", "/decoding"]]),
        "an empty decoding": ("decoding", _set("/decoding", {})),
        "a decoding that is a list": ("decoding", _set("/decoding", [])),
        "an end token that is a text": ("eos_token_ids", _set("/decoding/eos_token_ids", ["<|end|>"])),
        "a negative end token": ("eos_token_ids", _set("/decoding/eos_token_ids", [-1])),
        "end tokens that are a number": ("eos_token_ids", _set("/decoding/eos_token_ids", 2046)),
        "a hidden token that is a text": ("hidden_tokens", _set("/decoding/hidden_tokens/<s>", "1")),
        "hidden tokens that are a list": ("hidden_tokens", _set("/decoding/hidden_tokens", [1])),
        "a cache of an unknown dtype": ("dtype", _set("/decoding/cache/dtype", "float8")),
        "shared that is a number": ("shared", _set("/decoding/cache/shared", 1)),
    }
    for key in ("vocab_size", "context", "prefill_chunk", "cache", "eos_token_ids", "hidden_tokens"):
        damaged[f"no {key}"] = (key, [["remove", f"/decoding/{key}"]])
    for key in ("vocab_size", "context", "prefill_chunk", "rope_boundary"):
        for value in ("256", True, 0, -256, 256.5, 2**31, [256]):
            damaged[f"{key} {value!r}"] = (key, _set(f"/decoding/{key}", value))
    for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
        for value in ("2", True, 0, 2**53):
            damaged[f"{key} {value!r}"] = (key, _set(f"/decoding/cache/{key}", value))
    return damaged


def _contradictions() -> dict[str, tuple[str, Steps]]:
    """As `_structure`, of what the graph itself says otherwise."""
    return {
        "another vocabulary": ("vocab_size", _set("/decoding/vocab_size", 2049)),
        "a layer more": ("num_hidden_layers", _set("/decoding/cache/num_hidden_layers", 5)),
        "a billion layers": ("num_hidden_layers", _set("/decoding/cache/num_hidden_layers", 10**9)),
        "a head less": ("num_key_value_heads", _set("/decoding/cache/num_key_value_heads", 1)),
        "wider heads": ("head_dim", _set("/decoding/cache/head_dim", 64)),
        "another dtype": ("dtype", _set("/decoding/cache/dtype", "int8")),
    }


def _set(pointer: str, value: Any) -> Steps:
    return [["set", pointer, value]]


def _graph(**fields: Any) -> Steps:
    plain = {"file": "model.branches.onnx", "devices": {"cpu": "1.29"}, "optional_inputs": []}
    return _set("/graphs", [plain | fields])
