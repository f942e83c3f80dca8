"""The KV cache of attention -> int8 or int4, with scales that follow from the weights alone."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch

from phimoe_onnx.checkpoint.data import read_rows
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.passes._edit import MICROSOFT, NATIVE, expect, initializer, nodes
from phimoe_onnx.exporter.weights import Weight, job_piece, layer_of

# How many standard deviations of a channel the largest code stands for; more costs resolution, fewer clip.
DEVIATIONS = {8: 8.0, 4: 4.0}


class QuantizeCache(ir.passes.InPlacePass):
    """Makes every GroupQueryAttention keep its keys and values as integers of `bits`, and so, with 8 bits, every
    phimoe.native.Attention.

    1. The operator gets a fixed scale for each channel.
    2. The cache's inputs and outputs become int8 [B, K, T, D], or uint8 [B, K, T, D / 2] with two channels a byte.

    No data is needed for the scales: a LayerNorm with weight g and bias b hands a projection W numbers of mean square
    1, so channel c of W (g x + b) + bias has about the mean W_c b + bias_c and the standard deviation |W_c g|, and its
    scale is (|mean| + DEVIATIONS standard deviations) / the largest code. Rope turns channels c and c + D / 2 of a key
    into each other, so both get the larger deviation, and the length of the two means, times the larger mscale.

    Matches exactly `num_hidden_layers` places.

    Args:
        config: the model's shape.
        rows: the checkpoint's parameters.
        bits: 8 or 4.
    """

    def __init__(self, config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]], bits: int) -> None:
        super().__init__()
        self.config = config
        self.rows = rows
        self.bits = bits

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "GroupQueryAttention", MICROSOFT) or nodes(model, "Attention", NATIVE)
        expect("attention's cache", len(matches), self.config.num_hidden_layers)
        for layer, attention in enumerate(matches):
            prefix = f"model.layers.{layer}."
            scales = [initializer(model.graph, self._scale(prefix, projection)) for projection in ("k_proj", "v_proj")]
            attention.resize_inputs(14)
            for index, scale in zip((12, 13), scales, strict=True):
                attention.replace_input_with(index, scale)
            if attention.domain == MICROSOFT:
                for kind in ("k_quant_type", "v_quant_type"):
                    attention.attributes[kind] = ir.AttrString(kind, "PER_CHANNEL")
                attention.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", self.bits)
            for value in (*attention.inputs[3:5], *attention.outputs[1:3]):
                value.type = ir.TensorType(ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8)
                value.shape = ir.Shape([*value.shape[:3], self.config.head_dim * self.bits // 8])
        return ir.passes.PassResult(model, modified=bool(matches))

    def _scale(self, prefix: str, projection: str) -> Weight:
        """[1, K, 1, D]."""
        shape = (1, self.config.num_key_value_heads, 1, self.config.head_dim)
        run = partial(channel_scales, self.config, self.rows, prefix, projection, self.bits)
        name = f"{prefix}self_attn.{projection[0]}_cache.scale"
        return Weight(name, ir.DataType.FLOAT, shape, [job_piece(run, shape, ir.DataType.FLOAT, layer_of(prefix))])


def channel_scales(
    config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]], prefix: str, projection: str, bits: int
) -> torch.Tensor:
    """The scales of one layer's keys ("k_proj") or values ("v_proj"), float32 [1, K, 1, D]."""
    weight = read_rows(rows[f"{prefix}self_attn.{projection}.weight"])
    gain, offset = (read_rows(rows[f"{prefix}input_layernorm.{part}"]) for part in ("weight", "bias"))
    mean = weight @ offset
    if config.attention_bias:
        mean += read_rows(rows[f"{prefix}self_attn.{projection}.bias"])
    shape = (1, config.num_key_value_heads, 1, config.head_dim)
    mean, deviation = mean.abs().view(shape), (weight * gain).norm(dim=1).view(shape)
    if projection == "k_proj":
        mean, deviation = torch.hypot(*mean.chunk(2, dim=-1)), torch.maximum(*deviation.chunk(2, dim=-1))
        mscale = max(config.longrope.short_mscale, config.longrope.long_mscale) if config.longrope else 1.0
        mean, deviation = (torch.cat((x, x), dim=-1) * mscale for x in (mean, deviation))
    largest = 2 ** (bits - 1) - 1
    scale: torch.Tensor = (mean + DEVIATIONS[bits] * deviation) / largest
    return scale.clamp_min(torch.finfo(torch.float32).tiny)  # a channel of zeros
