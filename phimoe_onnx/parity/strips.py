"""Weights that a bundle stores in strips, for the native operators, back as matrices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from phimoe_onnx.bundle import StoredWeights
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.quantize.strips import Strips, unpack_down, unpack_gate_up


def stripped_name(parameter: str) -> str:
    """The initializer that holds a parameter of modeling.py: an expert's matrices lie together, so do Q, K and V."""
    stem, _, last = parameter.removesuffix(".weight").rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj"):
        last = "qkv_proj"
    return f"{stem}.strips" if stem.endswith("experts") else f"{stem}.{last}.strips".removeprefix(".")


def from_strips(parameter: str, packed: Tensor, forms: Mapping[str, StoredWeights], config: PhiMoEConfig) -> Tensor:
    """The parameter, or the matrix of one expert, float32 [N, K].

    Args:
        parameter: its name in modeling.py.
        packed: the initializer of `stripped_name`, uint8 [strips, strip_bytes], or its row of the expert.
        forms: how each parameter is stored.
        config: the model's shape.
    """
    stem, _, last = parameter.removesuffix(".weight").rpartition(".")
    if stem.endswith("experts"):
        gate_up, down = (_strips(forms[f"{stem}.{stack}"]) for stack in ("gate_up_proj", "down_proj"))
        sizes = config.hidden_size, config.intermediate_size
        if last == "gate_up_proj":
            return unpack_gate_up(packed, gate_up, *sizes)
        return unpack_down(packed, gate_up, down, *sizes)
    form, heads = _strips(forms[parameter]), config.num_attention_heads * config.head_dim
    inputs = heads if last == "o_proj" else config.hidden_size
    rows = form.unpack(packed, config.vocab_size if last == "lm_head" else len(packed) * 16, inputs)
    if last in ("q_proj", "k_proj", "v_proj"):
        kv = config.num_key_value_heads * config.head_dim
        part: Tensor = rows.split([heads, kv, kv])["qkv".index(last[0])]
        return part
    return rows[: config.hidden_size] if last == "o_proj" else rows


def _strips(form: StoredWeights) -> Strips:
    return Strips(int(form.dtype.removeprefix("int")))
