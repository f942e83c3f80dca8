"""config.json of a PhiMoE, in every writer's spelling, checked into one frozen dataclass."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from phimoe_onnx.errors import ConfigError, brief
from phimoe_onnx.files import read_json

FAMILIES = {"phimoe": "PhiMoE", "grinmoe": "GRIN-MoE"}  # by their names without case and hyphens
HEADS = {  # what an architecture is called behind its family, and the task that it was made for
    "": "text-generation",  # GRIN-MoE's config.json names the family alone
    "forcausallm": "text-generation",
    "forsequenceclassification": "text-classification",
    "model": "feature-extraction",
}
ARCHITECTURES = {  # transformers' names
    "text-generation": "PhimoeForCausalLM",
    "text-classification": "PhimoeForSequenceClassification",
    "feature-extraction": "PhimoeModel",
}
EXPECTED_ARCHITECTURES = ", ".join([*(name.replace("Phimoe", "PhiMoE") for name in ARCHITECTURES.values()), "GRIN-MoE"])
# Bounds, so that a slip of the pen is an error and no exhausted memory.
MAX_SIZE = 2**31 - 1
MAX_COUNT = 1 << 14  # of layers, of experts
MAX_POSITIONS = 1 << 21  # LongRoPE, arXiv 2402.13753, extends to so many; a table of the rope has a row for each
MAX_LABELS = 1 << 17
FP8_BLOCK = (128, 128)  # rows and columns, where config.json does not say it
METHODS = {"gptq": "GPTQ", "awq": "AWQ"}  # others are called as they are spelt
MIN_FLOAT, MAX_FLOAT = 1e-30, 3.4028234663852886e38  # what float32 can divide by, and its largest
RANGE = f", {MIN_FLOAT:g} to {MAX_FLOAT:.3g}"
DTYPES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")  # as PyTorch calls them
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class LongRope:
    """Two sets of rope factors: `short` up to `original_max_position_embeddings` tokens, `long` for every position
    beyond.

    `short_factor` and `long_factor` hold head_dim / 2 numbers that divide the inverse frequencies; the mscales multiply
    cos and sin. Source: LongRoPE, arXiv 2402.13753, with the mscales that PhiMoE's config.json gives.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    short_mscale: float
    long_mscale: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class PhiMoEConfig:
    """The shape of a PhiMoE; names and meanings are config.json's.

    Attributes:
        family: "PhiMoE" or "GRIN-MoE"; they are computed alike, and a bundle's config.json says the first.
        task: what `architectures` says the checkpoint was made for, None where it says nothing.
        labels: a classifier's, by the rows of its head.
        problem_type: one of PROBLEM_TYPES or None; what a classifier was trained for.
        fp8_block: how many rows and columns of an FP8 tensor share a scale where its scales are those of blocks.
    """

    family: str = field(compare=False)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    longrope: LongRope | None
    sliding_window: int | None
    router_jitter_noise: float
    attention_bias: bool
    lm_head_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_id: tuple[int, ...]
    task: str | None
    labels: tuple[str, ...]
    problem_type: str | None
    fp8_block: tuple[int, int] = field(compare=False)

    @property
    def window(self) -> int | None:
        """The sliding window where it hides anything, else None."""
        if self.sliding_window is None or self.sliding_window >= self.max_position_embeddings:
            return None
        return self.sliding_window

    @property
    def function_to_apply(self) -> Literal["softmax", "sigmoid", "none"]:
        """What makes scores of a classifier's logits, "softmax", "sigmoid" or "none"; transformers' pipeline has the
        same rule.
        """
        if self.problem_type == "regression":
            return "none"
        return "sigmoid" if self.problem_type == "multi_label_classification" or len(self.labels) == 1 else "softmax"


def read_config(folder: Path) -> PhiMoEConfig:
    """Reads and checks `folder`/config.json.

    Raises:
        ConfigError: there is no config.json, it is another model's, or a value is missing, misspelt or not supported.
    """
    return parse_config(read_json(folder / "config.json"), str(folder / "config.json"))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> PhiMoEConfig:
    """Checks a parsed config.json; `where` names it in errors.

    Raises:
        ConfigError: as for `read_config`.
    """
    family = family_of(raw.get("model_type"))
    if family is None:
        raise ConfigError(f"{where}: model_type is {brief(raw.get('model_type'))}, expected 'phimoe' or 'grinmoe'")
    for key in ("torch_dtype", "dtype"):
        _check_dtype(raw.get(key), f"{where}: {key}")
    task = _task(raw, where)
    fp8_block = _fp8_block(raw.get("quantization_config"), f"{where}: quantization_config")
    read = _Reader(raw, where)
    if read.get("hidden_act", str, "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act is {brief(raw['hidden_act'])}, only 'silu' is supported")
    if read.count("num_experts_per_tok", 2) != 2:
        raise ConfigError(f"{where}: num_experts_per_tok is {raw['num_experts_per_tok']}, SparseMixer routes to 2")
    hidden_size = read.count("hidden_size")
    heads = read.count("num_attention_heads")
    kv_heads = read.count("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"{where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    if raw.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(
            f"{where}: hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({heads}) and no "
            f"head_dim is given"
        )
    head_dim = hidden_size // heads if raw.get("head_dim") is None else read.count("head_dim")
    if head_dim % 2:
        raise ConfigError(f"{where}: head_dim is {head_dim}, rope needs an even number")
    experts = read.count("num_local_experts", 16, most=MAX_COUNT)
    if experts < 2:
        raise ConfigError(f"{where}: num_local_experts is {experts}, expected 2 or more")
    max_positions = read.count("max_position_embeddings", most=MAX_POSITIONS)
    vocab_size = read.count("vocab_size")
    rope_theta, longrope = _rope(read, head_dim, max_positions)
    problem_type = raw.get("problem_type")
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ConfigError(
            f"{where}: problem_type is {brief(problem_type)}, expected one of {', '.join(PROBLEM_TYPES)} or null"
        )
    return PhiMoEConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=read.count("intermediate_size"),
        num_hidden_layers=read.count("num_hidden_layers", most=MAX_COUNT),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_local_experts=experts,
        max_position_embeddings=max_positions,
        rms_norm_eps=read.number("rms_norm_eps", 1e-5),
        rope_theta=rope_theta,
        longrope=longrope,
        sliding_window=None if raw.get("sliding_window") is None else read.count("sliding_window"),
        router_jitter_noise=read.number("router_jitter_noise", 0.01, zero=True),
        attention_bias=read.get("attention_bias", bool, False),
        lm_head_bias=read.get("lm_head_bias", bool, False),
        tie_word_embeddings=read.get("tie_word_embeddings", bool, False),
        bos_token_id=read_token_id(raw, "bos_token_id", vocab_size, where),
        pad_token_id=read_token_id(raw, "pad_token_id", vocab_size, where),
        eos_token_id=read_token_ids(raw, "eos_token_id", vocab_size, where),
        task=task,
        labels=_labels(read),
        problem_type=problem_type,
        fp8_block=fp8_block,
    )


def family_of(model_type: object) -> str | None:
    """The name of the family that a config.json's `model_type` means in any spelling, None where it is another's."""
    return FAMILIES.get(_plain(model_type)) if isinstance(model_type, str) else None


def for_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    """A checked config.json as transformers, optimum and onnxruntime-genai know it: model_type and architectures in
    their spelling, without the quantization_config of weights that are stored as plain numbers from here on.
    """
    spelt = {key: value for key, value in raw.items() if key != "quantization_config"} | {"model_type": "phimoe"}
    task = _task(raw, "config.json")
    if task and not re.match("phimoe.", raw["architectures"][0], re.IGNORECASE):
        spelt["architectures"] = [ARCHITECTURES[task]]
    return spelt


def read_token_id(raw: dict[str, Any], key: str, vocab_size: int, where: str) -> int | None:
    """The token id under `key` of a parsed JSON file that `where` names, None where it is missing or null.

    Raises:
        ConfigError: it holds something else, or no token of the vocabulary.
    """
    if isinstance(raw.get(key), list):
        raise ConfigError(f"{where}: {key} is {brief(raw[key])}, expected one token id or null")
    return next(iter(read_token_ids(raw, key, vocab_size, where)), None)


def read_token_ids(raw: dict[str, Any], key: str, vocab_size: int, where: str) -> tuple[int, ...]:
    """The token id or ids under `key` of a parsed JSON file that `where` names; none where it is missing or null.

    Raises:
        ConfigError: it holds something else, or no tokens of the vocabulary.
    """
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise ConfigError(f"{where}: {key} is {brief(value)}, expected a token id or several")
    if outside := [id for id in ids if id >= vocab_size]:
        raise ConfigError(
            f"{where}: {key} is {brief(outside[0])}, but the model's vocab_size is {vocab_size}; "
            f"expected a token id below it"
        )
    return tuple(ids)


def _check_dtype(name: object, where: str) -> None:
    """The tensors say themselves what they are stored in; but other programs open a bundle's config.json."""
    if name is not None and not (isinstance(name, str) and name in DTYPES):
        raise ConfigError(f"{where} is {brief(name)}, expected float32, float16, bfloat16 or null")


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def _fp8_block(quantization: object, where: str) -> tuple[int, int]:
    """What config.json says of FP8's blocks; every other quantisation is refused."""
    if quantization is None:
        return FP8_BLOCK
    if not isinstance(quantization, dict):
        raise ConfigError(f"{where} is {brief(quantization)}, expected an object or null")
    method = quantization.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in quantization else None)
    if not _is_fp8(quantization, method):
        raise ConfigError(f"{where}: {quantised(METHODS.get(str(method), brief(method)))}")
    block = quantization.get("weight_block_size")
    if block is None:
        return FP8_BLOCK
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= MAX_SIZE for n in block)):
        raise ConfigError(f"{where}: weight_block_size is {brief(block)}, expected rows and columns")
    return block[0], block[1]


def _is_fp8(quantization: dict[str, Any], method: object) -> bool:
    if method == "compressed-tensors":
        groups = quantization.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if _objects(groups) else []
        return bool(weights) and all(
            isinstance(each, dict) and (each.get("type"), each.get("num_bits")) == ("float", 8) for each in weights
        )
    return method in ("fp8", "fbgemm_fp8") or (method == "modelopt" and quantization.get("quant_algo") == "FP8")


def _objects(value: object) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


def quantised(method: str) -> str:
    """The sentence for weights that `method` has rounded already."""
    return (
        f"the weights are already quantised ({method}); give the checkpoint from which they were made, in float32, "
        f"float16, bfloat16 or FP8, and ask for --quantize int4 or int8"
    )


def _task(raw: dict[str, Any], where: str) -> str | None:
    """What the first of `architectures` was made for, None where there is none."""
    names = raw.get("architectures")
    tasks = [_task_of(name) for name in names] if isinstance(names, list) else [] if names is None else [None]
    if None in tasks:
        raise ConfigError(f"{where}: architectures is {brief(names)}, expected one of {EXPECTED_ARCHITECTURES}")
    return tasks[0] if tasks else None


def _task_of(architecture: object) -> str | None:
    if not isinstance(architecture, str):
        return None
    name = _plain(architecture)
    family = next((family for family in FAMILIES if name.startswith(family)), None)
    return None if family is None else HEADS.get(name.removeprefix(family))


class _Reader:
    """Typed look-ups in one JSON object whose errors name the file and the key."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self.raw.get(key, default)
        if value is None and kind is bool:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.where}: {key} is {brief(value)}, which has the wrong type")
        return value

    def count(self, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise ConfigError(f"{self.where}: {key} is {brief(value)}, expected a positive integer")
        if value > most:
            raise ConfigError(f"{self.where}: {key} is {brief(value)}, expected {most} at most")
        return int(value)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.get(key, (int, float), default)
        if not (MIN_FLOAT <= value <= MAX_FLOAT or (zero and value == 0)):
            raise ConfigError(f"{self.where}: {key} is {brief(value)}, expected a positive number{RANGE}")
        return float(value)

    def factors(self, key: str, length: int) -> tuple[float, ...]:
        values = self.get(key, list)
        if len(values) != length or not all(type(v) in (int, float) and MIN_FLOAT <= v <= MAX_FLOAT for v in values):
            raise ConfigError(
                f"{self.where}: {key} has {len(values)} entries, expected head_dim / 2 = {length} "
                f"positive numbers{RANGE}"
            )
        return tuple(float(v) for v in values)


def _rope(read: _Reader, head_dim: int, max_positions: int) -> tuple[float, LongRope | None]:
    """rope_theta and longrope's factors, from `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    name = "rope_scaling" if read.raw.get("rope_parameters") is None else "rope_parameters"
    scaling = read.raw.get(name)
    if scaling is not None and not isinstance(scaling, dict):
        raise ConfigError(f"{read.where}: {name} is {brief(scaling)}, expected an object or null")
    theta = (scaling or {}).get("rope_theta", read.raw.get("rope_theta"))
    inner = _Reader({**(scaling or {}), "rope_theta": theta}, f"{read.where}: {name}")
    rope_theta = inner.number("rope_theta")
    if scaling is None:
        return rope_theta, None
    # transformers 5 writes plain rope as rope_parameters, where the type may be left out
    kind = scaling.get("rope_type", scaling.get("type", "default" if scaling.keys() == {"rope_theta"} else None))
    if kind == "default" and name == "rope_parameters":
        return rope_theta, None
    if kind != "longrope":
        raise ConfigError(
            f"{read.where}: {name} has the rope type {brief(kind)}, expected 'longrope', or null in its place"
        )
    return rope_theta, LongRope(
        short_factor=inner.factors("short_factor", head_dim // 2),
        long_factor=inner.factors("long_factor", head_dim // 2),
        short_mscale=inner.number("short_mscale"),
        long_mscale=inner.number("long_mscale"),
        original_max_position_embeddings=inner.count(
            "original_max_position_embeddings", read.raw.get("original_max_position_embeddings", max_positions)
        ),
    )


def _labels(read: _Reader) -> tuple[str, ...]:
    """The values of id2label in order; LABEL_0 and so on where there are none, two of them if num_labels does not say
    otherwise.
    """
    names = read.raw.get("id2label")
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(read.count("num_labels", 2, most=MAX_LABELS)))
    expected = f"{read.where}: id2label is {brief(names)}, expected"
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{expected} an object of names")
    if len(names) > MAX_LABELS:
        raise ConfigError(f"{expected} {MAX_LABELS} labels at most")
    if not names or names.keys() != {str(index) for index in range(len(names))}:
        raise ConfigError(f'{expected} the keys "0" to one less than the number of labels')
    if len(set(names.values())) < len(names):
        raise ConfigError(f"{expected} a name of its own for each label")
    return tuple(names[str(index)] for index in range(len(names)))
