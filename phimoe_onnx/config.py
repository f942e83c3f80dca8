"""config.json of a PhiMoE, in either writer's spelling, checked into one frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phimoe_onnx.errors import ConfigError
from phimoe_onnx.files import read_json

ARCHITECTURES = {  # and the task that each was made for; Microsoft spells the name one way, transformers the other
    "PhiMoEForCausalLM": "text-generation",
    "PhimoeForCausalLM": "text-generation",
    "PhiMoEForSequenceClassification": "text-classification",
    "PhimoeForSequenceClassification": "text-classification",
    "PhiMoEModel": "feature-extraction",
    "PhimoeModel": "feature-extraction",
}
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
        task: what `architectures` says the checkpoint was made for, None where it says nothing.
        labels: a classifier's, by the rows of its head.
        problem_type: one of PROBLEM_TYPES or None; what a classifier was trained for.
    """

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
    eos_token_id: tuple[int, ...]
    task: str | None
    labels: tuple[str, ...]
    problem_type: str | None

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
    architectures = raw.get("architectures") or []
    if raw.get("model_type") != "phimoe":
        raise ConfigError(f"{where}: model_type is {raw.get('model_type')!r}, expected 'phimoe'")
    if not isinstance(architectures, list) or not all(name in tuple(ARCHITECTURES) for name in architectures):
        raise ConfigError(f"{where}: architectures is {architectures}, expected one of {', '.join(ARCHITECTURES)}")
    read = _Reader(raw, where)
    if read.get("hidden_act", str, "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act is {raw['hidden_act']!r}, only 'silu' is supported")
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
    head_dim = read.count("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise ConfigError(f"{where}: head_dim is {head_dim}, rope needs an even number")
    experts = read.count("num_local_experts", 16)
    if experts < 2:
        raise ConfigError(f"{where}: num_local_experts is {experts}, expected 2 or more")
    max_positions = read.count("max_position_embeddings")
    rope_theta, longrope = _rope(read, head_dim, max_positions)
    problem_type = raw.get("problem_type")
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ConfigError(
            f"{where}: problem_type is {problem_type!r}, expected one of {', '.join(PROBLEM_TYPES)} or null"
        )
    return PhiMoEConfig(
        vocab_size=read.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.count("intermediate_size"),
        num_hidden_layers=read.count("num_hidden_layers"),
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
        bos_token_id=next(iter(read_token_ids(raw, "bos_token_id", where)), None),
        eos_token_id=read_token_ids(raw, "eos_token_id", where),
        task=ARCHITECTURES[architectures[0]] if architectures else None,
        labels=_labels(read),
        problem_type=problem_type,
    )


def read_token_ids(raw: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    """The token id or ids under `key` of a parsed JSON file that `where` names; none where it is missing.

    Raises:
        ConfigError: it holds something else.
    """
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise ConfigError(f"{where}: {key} is {value!r}, expected a token id or several")
    return tuple(ids)


class _Reader:
    """Typed look-ups in one JSON object whose errors name the file and the key."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.where}: {key} is {value!r}, which has the wrong type")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise ConfigError(f"{self.where}: {key} is {value}, expected a positive integer")
        return int(value)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = float(self.get(key, (int, float), default))
        if not (0 < value < math.inf or (zero and value == 0)):
            raise ConfigError(f"{self.where}: {key} is {value}, expected a positive number")
        return value

    def factors(self, key: str, length: int) -> tuple[float, ...]:
        values = self.get(key, list)
        if len(values) != length or not all(type(v) in (int, float) and 0 < v < math.inf for v in values):
            raise ConfigError(
                f"{self.where}: {key} has {len(values)} entries, expected head_dim / 2 = {length} positive numbers"
            )
        return tuple(float(v) for v in values)


def _rope(read: _Reader, head_dim: int, max_positions: int) -> tuple[float, LongRope | None]:
    """rope_theta and longrope's factors, from `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    name = "rope_parameters" if read.raw.get("rope_parameters") else "rope_scaling"
    scaling = read.raw.get(name) or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"{read.where}: {name} is {scaling!r}, expected an object or null")
    theta = scaling.get("rope_theta", read.raw.get("rope_theta"))
    inner = _Reader({**scaling, "rope_theta": theta}, f"{read.where}: {name}")
    rope_theta = inner.number("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return rope_theta, None
    if kind != "longrope":
        raise ConfigError(f"{read.where}: rope type {kind!r} is not supported, expected 'longrope' or none")
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
        return tuple(f"LABEL_{index}" for index in range(read.count("num_labels", 2)))
    expected = f"{read.where}: id2label is {names!r}, expected"
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{expected} an object of names")
    if not names or names.keys() != {str(index) for index in range(len(names))}:
        raise ConfigError(f'{expected} the keys "0" to one less than the number of labels')
    if len(set(names.values())) < len(names):
        raise ConfigError(f"{expected} a name of its own for each label")
    return tuple(names[str(index)] for index in range(len(names)))
