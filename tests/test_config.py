"""config.json in every writer's spelling, its defaults, and a ConfigError that names file and key for each bad one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from phimoe_onnx.config import LongRope, PhiMoEConfig, for_transformers, parse_config, read_config
from phimoe_onnx.errors import ConfigError, PhiMoEError
from tests.checkpoints import BASE, MODEL, SHAPES, longrope

FACTORS = {key: value for key, value in longrope(16).items() if key not in ("type", "original_max_position_embeddings")}
EXPECTED = LongRope(tuple(FACTORS["short_factor"]), tuple(FACTORS["long_factor"]), 1.05, 1.2, 32)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in BASE.items() if key not in keys}


def test_every_value_is_read() -> None:
    raw = BASE | {
        "head_dim": 32,
        "sliding_window": 20,
        "rope_scaling": longrope(32),
        "rope_theta": 5e5,
        "eos_token_id": [7, 8],
    }
    assert parse_config(raw) == PhiMoEConfig(
        family="PhiMoE",
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        longrope=LongRope(
            tuple(1.0 + 0.02 * i for i in range(16)), tuple(1.0 + 0.4 * i for i in range(16)), 1.05, 1.2, 32
        ),
        sliding_window=20,
        router_jitter_noise=0.01,
        attention_bias=True,
        lm_head_bias=True,
        tie_word_embeddings=False,
        bos_token_id=1,
        pad_token_id=None,
        eos_token_id=(7, 8),
        task="text-generation",
        labels=("LABEL_0", "LABEL_1"),
        problem_type=None,
        fp8_block=(128, 128),
    )


@pytest.mark.parametrize("name", ["PhiMoE", "Phimoe"])
def test_both_names_of_an_architecture_are_the_same_model(name: str) -> None:
    assert parse_config(BASE | {"architectures": [f"{name}ForCausalLM"]}) == parse_config(BASE)
    for suffix, task in (("ForSequenceClassification", "text-classification"), ("Model", "feature-extraction")):
        assert parse_config(BASE | {"architectures": [name + suffix]}) == dataclasses.replace(
            parse_config(BASE), task=task
        )


@pytest.mark.parametrize("model_type", ["grinmoe", "GRIN-MoE", "grin-moe", "grin_moe", "GrinMoE"])
@pytest.mark.parametrize("architecture", ["GRIN-MoE", "GRINMoEForCausalLM", "GrinMoeForCausalLM"])
def test_grin_moe_is_one_of_the_family(model_type: str, architecture: str) -> None:
    raw = BASE | {"model_type": model_type, "architectures": [architecture], "auto_map": {"AutoConfig": "x.Y"}}
    assert parse_config(raw) == parse_config(BASE)
    assert (parse_config(raw).family, parse_config(BASE).family) == ("GRIN-MoE", "PhiMoE")
    known = for_transformers(raw)
    assert known == raw | {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]}
    assert list(known) == list(raw)


def test_every_head_of_grin_moe() -> None:
    for suffix, task in (("ForSequenceClassification", "text-classification"), ("Model", "feature-extraction")):
        raw = BASE | {"model_type": "grinmoe", "architectures": [f"GRINMoE{suffix}"]}
        assert parse_config(raw).task == task
        assert for_transformers(raw)["architectures"] == [f"Phimoe{suffix}"]


@pytest.mark.parametrize(
    "name", ["PhiMoEForCausalLM", "PhimoeForCausalLM", "PhiMoEModel", "PhimoeForSequenceClassification"]
)
def test_what_others_know_stays_as_it_is(name: str) -> None:
    raw = BASE | {"architectures": [name], "something": {"else": [1]}}
    assert for_transformers(raw) == raw
    assert for_transformers(without("architectures")) == without("architectures")


@pytest.mark.parametrize(
    ("quantization", "block"),
    [
        (None, (128, 128)),
        ({"quant_method": "fp8"}, (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, (64, 32)),
        ({"quant_method": "fbgemm_fp8"}, (128, 128)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, (128, 128)),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
            },
            (128, 128),
        ),
    ],
)
def test_fp8_is_read(quantization: dict[str, Any] | None, block: tuple[int, int]) -> None:
    raw = BASE | {"quantization_config": quantization}
    assert parse_config(raw).fp8_block == block
    assert for_transformers(raw) == BASE


@pytest.mark.parametrize(
    "raw", [without("architectures"), BASE | {"architectures": None}, BASE | {"architectures": []}]
)
def test_the_architecture_may_be_left_out(raw: dict[str, Any]) -> None:
    assert parse_config(raw) == dataclasses.replace(parse_config(BASE), task=None)


LABELS = {"0": "no", "1": "yes", "2": "perhaps"}


@pytest.mark.parametrize(
    ("raw", "labels"),
    [
        ({"id2label": LABELS}, ("no", "yes", "perhaps")),
        ({"id2label": dict(reversed(LABELS.items()))}, ("no", "yes", "perhaps")),
        ({"id2label": LABELS, "num_labels": 5}, ("no", "yes", "perhaps")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"num_labels": 1, "id2label": None}, ("LABEL_0",)),
    ],
)
def test_labels(raw: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert parse_config(BASE | raw).labels == labels


@pytest.mark.parametrize(
    ("labels", "problem_type", "function"),
    [
        (3, None, "softmax"),
        (1, None, "sigmoid"),
        (3, "single_label_classification", "softmax"),
        (1, "single_label_classification", "sigmoid"),
        (3, "multi_label_classification", "sigmoid"),
        (1, "regression", "none"),
        (3, "regression", "none"),
    ],
)
def test_what_makes_scores_of_logits(labels: int, problem_type: str | None, function: str) -> None:
    assert parse_config(BASE | {"num_labels": labels, "problem_type": problem_type}).function_to_apply == function


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 32, **FACTORS}},
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}},
        {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 32},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}},
        {"rope_parameters": {"rope_type": "longrope", **FACTORS}, "original_max_position_embeddings": 32},
    ],
)
@pytest.mark.parametrize("theta", ["beside", "inside"])
def test_every_spelling_of_longrope(rope: dict[str, Any], theta: str) -> None:
    raw = without("rope_theta", "rope_scaling") | json.loads(json.dumps(rope))
    if theta == "beside":
        raw["rope_theta"] = 500.0
    else:
        next(value for key, value in raw.items() if key in rope and isinstance(value, dict))["rope_theta"] = 500.0
    config = parse_config(raw)
    assert config.longrope == EXPECTED
    assert config.rope_theta == 500.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_parameters": None, "rope_scaling": None},
    ],
)
def test_every_spelling_of_plain_rope(rope: dict[str, Any]) -> None:
    config = parse_config(without("rope_theta", "rope_scaling") | rope)
    assert config.longrope is None
    assert config.rope_theta == 500.0


def test_longrope_without_a_boundary_ends_where_the_context_does() -> None:
    config = parse_config(BASE | {"rope_scaling": {"type": "longrope", **FACTORS}})
    assert config.longrope is not None
    assert config.longrope.original_max_position_embeddings == 128


def test_defaults() -> None:
    shape = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    needed = (*shape, "max_position_embeddings", "rope_theta")
    config = parse_config({"model_type": "phimoe"} | {key: BASE[key] for key in needed})
    expected = parse_config(BASE | {"attention_bias": False, "lm_head_bias": False})
    assert config == dataclasses.replace(expected, bos_token_id=None, eos_token_id=(), task=None)
    assert config.head_dim == 16
    assert config.num_local_experts == 16


@pytest.mark.parametrize(("sliding_window", "window"), [(None, None), (9, 9), (127, 127), (128, None), (4096, None)])
def test_a_window_that_hides_nothing_is_none(sliding_window: int | None, window: int | None) -> None:
    config = parse_config(BASE | {"sliding_window": sliding_window})
    assert (config.sliding_window, config.window) == (sliding_window, window)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_is_read_like_its_contents(tmp_path: Path, shape: str) -> None:
    raw = BASE | SHAPES[shape]
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert read_config(tmp_path) == parse_config(raw)


def test_the_small_model() -> None:
    config = read_config(MODEL)
    assert config.longrope is not None
    assert config.longrope.original_max_position_embeddings < config.max_position_embeddings
    assert config.num_local_experts == 16


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (BASE | {"model_type": "mixtral"}, ["model_type", "'mixtral'", "'phimoe'"]),
        (without("model_type"), ["model_type", "None"]),
        (BASE | {"architectures": ["LlamaForCausalLM"]}, ["architectures", "LlamaForCausalLM", "PhiMoEForCausalLM"]),
        (BASE | {"architectures": "PhiMoEForCausalLM"}, ["architectures"]),
        (BASE | {"id2label": ["no", "yes"]}, ["id2label", "an object of names"]),
        (BASE | {"id2label": {"0": 0, "1": 1}}, ["id2label", "an object of names"]),
        (BASE | {"id2label": {}}, ["id2label", "keys"]),
        (BASE | {"id2label": {"1": "no", "2": "yes"}}, ["id2label", "keys"]),
        (BASE | {"id2label": {"0": "no", "1": "no"}}, ["id2label", "a name of its own"]),
        (BASE | {"num_labels": 0}, ["num_labels", "0"]),
        (BASE | {"problem_type": "guessing"}, ["problem_type", "'guessing'", "regression"]),
        (BASE | {"architectures": [["PhiMoEForCausalLM"]]}, ["architectures"]),
        (BASE | {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        (BASE | {"num_experts_per_tok": 3}, ["num_experts_per_tok", "3", "2"]),
        (without("hidden_size"), ["hidden_size", "missing"]),
        (without("vocab_size"), ["vocab_size", "missing"]),
        (without("intermediate_size"), ["intermediate_size", "missing"]),
        (without("num_hidden_layers"), ["num_hidden_layers", "missing"]),
        (without("num_attention_heads"), ["num_attention_heads", "missing"]),
        (without("max_position_embeddings"), ["max_position_embeddings", "missing"]),
        (BASE | {"hidden_size": "64"}, ["hidden_size", "'64'", "wrong type"]),
        (BASE | {"hidden_size": 64.0}, ["hidden_size", "64.0", "wrong type"]),
        (BASE | {"vocab_size": True}, ["vocab_size", "True", "wrong type"]),
        (BASE | {"vocab_size": 0}, ["vocab_size", "0", "positive"]),
        (BASE | {"num_hidden_layers": -1}, ["num_hidden_layers", "-1", "positive"]),
        (BASE | {"attention_bias": 1}, ["attention_bias", "1", "wrong type"]),
        (BASE | {"lm_head_bias": "yes"}, ["lm_head_bias", "'yes'", "wrong type"]),
        (BASE | {"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'", "wrong type"]),
        (BASE | {"router_jitter_noise": [0.01]}, ["router_jitter_noise", "wrong type"]),
        (BASE | {"sliding_window": 0}, ["sliding_window", "0", "positive"]),
        (BASE | {"sliding_window": "all"}, ["sliding_window", "'all'", "wrong type"]),
        (BASE | {"num_key_value_heads": 3}, ["num_attention_heads", "4", "num_key_value_heads", "3"]),
        (
            BASE | {"num_attention_heads": 6, "num_key_value_heads": 2},
            ["hidden_size", "64", "num_attention_heads", "6", "head_dim"],
        ),
        (BASE | {"head_dim": 15}, ["head_dim", "15", "even"]),
        (BASE | {"num_local_experts": 1}, ["num_local_experts", "1", "2 or more"]),
        (BASE | {"rope_scaling": {"type": "yarn"}}, ["rope", "'yarn'", "longrope"]),
        (BASE | {"rope_parameters": {"rope_type": "linear"}}, ["rope", "'linear'", "longrope"]),
        (BASE | {"rope_scaling": "longrope"}, ["rope_scaling", "'longrope'", "object"]),
        *(
            (BASE | {"rope_scaling": scaling}, ["rope_scaling", repr(scaling), "object or null"])
            for scaling in (0, False, [], "")
        ),
        (BASE | {"rope_scaling": {}}, ["rope_scaling", "None", "longrope"]),
        (BASE | {"rope_scaling": {"type": "default"}}, ["rope_scaling", "'default'", "longrope", "null"]),
        (BASE | {"rope_scaling": FACTORS}, ["rope_scaling", "None", "longrope"]),
        (BASE | {"rope_parameters": FACTORS}, ["rope_parameters", "None", "longrope"]),
        (BASE | {"rope_parameters": {}}, ["rope_parameters", "None", "longrope"]),
        (BASE | {"bos_token_id": [1]}, ["bos_token_id", "[1]", "one token id or null"]),
        (BASE | {"bos_token_id": 1.0}, ["bos_token_id", "1.0", "token id"]),
        (BASE | {"bos_token_id": 2048}, ["bos_token_id", "2048", "vocab_size is 2048"]),
        (BASE | {"pad_token_id": 2048}, ["pad_token_id", "2048", "vocab_size is 2048"]),
        (BASE | {"pad_token_id": [0]}, ["pad_token_id", "[0]", "one token id or null"]),
        (BASE | {"pad_token_id": "</s>"}, ["pad_token_id", "'</s>'", "token id"]),
        (BASE | {"eos_token_id": [7, 5000]}, ["eos_token_id", "5000", "vocab_size is 2048"]),
        (BASE | {"max_position_embeddings": 10**8}, ["max_position_embeddings", "100000000", "2097152 at most"]),
        (BASE | {"num_labels": 10**9}, ["num_labels", "1000000000", "131072 at most"]),
        (BASE | {"num_hidden_layers": 2**63}, ["num_hidden_layers", "9223372036854775808", "16384 at most"]),
        (BASE | {"num_local_experts": 2**31}, ["num_local_experts", "2147483648", "16384 at most"]),
        (BASE | {"vocab_size": 10**400}, ["vocab_size", "1000", "2147483647 at most"]),
        (BASE | {"rope_theta": 10**400}, ["rope_theta", "1000", "positive number"]),
        (BASE | {"rope_theta": float("inf")}, ["rope_theta", "inf", "positive number"]),
        (BASE | {"rms_norm_eps": 10**400}, ["rms_norm_eps", "1000", "positive number"]),
        (BASE | {"rope_scaling": longrope(16) | {"long_factor": [1.0] * 7 + [10**400]}}, ["long_factor", "positive"]),
        (BASE | {"model_type": 5}, ["model_type", "5", "'phimoe'"]),
        (BASE | {"model_type": "x" * 10**6}, ["model_type", "xxx...xxx", "'phimoe'"]),
        (BASE | {"architectures": ["GRIN-MoEForPoetry"]}, ["architectures", "GRIN-MoEForPoetry"]),
        *(
            (
                BASE | {"quantization_config": quantization},
                ["quantization_config", "already quantised", name, "--quantize int4"],
            )
            for quantization, name in (
                ({"quant_method": "gptq", "bits": 4}, "(GPTQ)"),
                ({"quant_method": "awq"}, "(AWQ)"),
                ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "('bitsandbytes')"),
                ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "('bitsandbytes')"),
                ({"quant_method": "mxfp4"}, "('mxfp4')"),
                ({"quant_method": "compressed-tensors", "config_groups": {}}, "('compressed-tensors')"),
                ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "('modelopt')"),
                ({}, "(None)"),
            )
        ),
        (BASE | {"quantization_config": "fp8"}, ["quantization_config", "'fp8'", "object or null"]),
        (
            BASE | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            ["weight_block_size", "[128]", "rows and columns"],
        ),
        (BASE | {"rope_theta": "1e4"}, ["rope_theta", "'1e4'", "wrong type"]),
        (BASE | {"rope_theta": None}, ["rope_theta", "missing"]),
        (BASE | {"rope_theta": 0}, ["rope_theta", "is 0,", "positive"]),
        (BASE | {"rms_norm_eps": -1e-5}, ["rms_norm_eps", "-1e-05", "positive"]),
        (BASE | {"router_jitter_noise": None}, ["router_jitter_noise", "missing"]),
        (BASE | {"rms_norm_eps": None}, ["rms_norm_eps", "missing"]),
        (BASE | {"rope_theta": 1e-308}, ["rope_theta", "1e-308", "1e-30 to 3.4e+38"]),
        (BASE | {"rope_scaling": longrope(16) | {"short_factor": [1e-45] * 8}}, ["short_factor", "1e-30 to 3.4e+38"]),
        (BASE | {"torch_dtype": "float32x"}, ["torch_dtype", "'float32x'", "bfloat16"]),
        (BASE | {"dtype": 32}, ["dtype", "32", "bfloat16"]),
        (BASE | {"router_jitter_noise": -0.1}, ["router_jitter_noise", "-0.1", "positive"]),
        (BASE | {"rope_scaling": longrope(16) | {"long_mscale": float("nan")}}, ["long_mscale", "nan", "positive"]),
        (BASE | {"rope_scaling": longrope(16) | {"long_factor": [1.0] * 7 + [True]}}, ["long_factor", "positive"]),
        (BASE | {"eos_token_id": "x"}, ["eos_token_id", "'x'", "token id"]),
        (BASE | {"eos_token_id": [7, 1.5]}, ["eos_token_id", "1.5", "token id"]),
        (BASE | {"bos_token_id": "a"}, ["bos_token_id", "'a'", "token id"]),
        (BASE | {"rope_scaling": longrope(32)}, ["rope_scaling", "short_factor", "16 entries", "head_dim / 2 = 8"]),
        (
            BASE | {"rope_scaling": longrope(16) | {"long_factor": [1.0] * 7}},
            ["rope_scaling", "long_factor", "7 entries", "8"],
        ),
        (
            BASE | {"rope_scaling": longrope(16) | {"long_factor": [1.0] * 7 + [0.0]}},
            ["rope_scaling", "long_factor", "positive"],
        ),
        (
            BASE | {"rope_scaling": longrope(16) | {"long_factor": [1.0] * 7 + ["1"]}},
            ["rope_scaling", "long_factor", "positive"],
        ),
        (BASE | {"rope_scaling": longrope(16) | {"short_factor": 1.0}}, ["rope_scaling", "short_factor", "wrong type"]),
        (BASE | {"rope_scaling": longrope(16) | {"short_mscale": None}}, ["rope_scaling", "short_mscale", "missing"]),
        (
            BASE | {"rope_scaling": longrope(16) | {"original_max_position_embeddings": 0}},
            ["original_max_position_embeddings", "positive"],
        ),
    ],
)
def test_each_error_names_file_and_key(tmp_path: Path, raw: dict[str, Any], words: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    for word in (str(tmp_path / "config.json"), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1538\n", ["Git LFS pointer", "git lfs pull"]),
        (b"{", ["is not JSON"]),
        (b'{"a": ' * 100_000, ["is not JSON"]),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", ["is not JSON"]),
        (b"[1, 2]", ["expected a JSON object", "list"]),
        (b"\xff\xfe", ["cannot be read"]),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    for word in (str(tmp_path / "config.json"), *words):
        assert word in str(error.value)


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_or_a_device_in_place_of_the_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read \(it is no regular file\)"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read \(it is no regular file\)"):
        read_config(tmp_path)


def test_a_value_that_is_nearly_too_deep_is_named(tmp_path: Path) -> None:
    for depth in range(900, 1000, 7):
        deep = "[" * depth + "]" * depth
        (tmp_path / "config.json").write_text(json.dumps(BASE)[:-1] + f', "bos_token_id": {deep}}}')
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(tmp_path)


def test_every_error_can_be_caught_as_one() -> None:
    assert issubclass(ConfigError, PhiMoEError)
