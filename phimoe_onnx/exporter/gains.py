"""Gains of norms that are far above the others move into the matrices that read the norm.

A norm's gain multiplies a channel of what attention and experts read. Where a gain is far above the others, so is the
channel, and kernels that round a row of such numbers by a common scale have few levels left for the other channels. The
same function with even channels: the gain (and the offset) divided by s, the column of each matrix that reads the
channel multiplied by it. s is a power of two, so no bit of any product changes before weights are rounded.

"Gamma migration" of Outlier Suppression (arXiv 2209.13325), there for all of the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import PhiMoEConfig

OUTLIER = 4  # times the median of a norm's gains; what is below stays as it is in the checkpoint
READERS = {
    "input_layernorm": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "post_attention_layernorm": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.gate_up_proj"),
}


def even_gains(config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]]) -> dict[str, tuple[Rows, ...]]:
    """A checkpoint's parameters, by modeling.py's names, of the same function with even gains; nothing is read yet.

    The norm before the head keeps its gains: what it gives is shown as the last hidden state.
    """
    found = dict(rows)
    for layer in range(config.num_hidden_layers):
        for norm, readers in READERS.items():
            prefix = f"model.layers.{layer}."
            gain, offset = (f"{prefix}{norm}.{part}" for part in ("weight", "bias"))
            scales = _scales(rows[gain])
            for name in (gain, offset):
                found[name] = tuple(_scaled(part, scales, torch.Tensor.div) for part in rows[name])
            for name in readers:
                found[prefix + name] = tuple(_scaled(part, scales, torch.Tensor.mul) for part in rows[prefix + name])
    return found


def _scales(gain: tuple[Rows, ...]) -> Callable[[], torch.Tensor | None]:
    """What reads s of each channel [K], float32; None where all are 1."""

    @cache
    def read() -> torch.Tensor | None:
        sizes = torch.cat([part.read() for part in gain]).float().abs()
        ratios = sizes / sizes.median()
        # a median of 0, or a gain that is not finite, which whoever reads it next will name
        outliers = (ratios >= OUTLIER) & ratios.isfinite()
        return torch.where(outliers, ratios.log2().round().exp2(), 1.0) if outliers.any() else None

    return read


def _scaled(
    rows: Rows,
    scales: Callable[[], torch.Tensor | None],
    scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Rows:
    """The rows [N, K] or [K] times or by `scales`, float32 where there are any: float16's range would not do."""

    def read() -> torch.Tensor:
        tensor, factors = rows.read(), scales()
        return tensor if factors is None else scale(tensor.float(), factors)

    return Rows(rows.shape, read)
