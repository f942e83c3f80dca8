"""The weights that a bundle really stores, back in PyTorch: quantisation error without kernel error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch import Tensor, nn

from phimoe_onnx import modeling
from phimoe_onnx.bundle import Manifest
from phimoe_onnx.errors import BundleError
from phimoe_onnx.exporter.quantize.rtn import Format
from phimoe_onnx.modeling import PhiMoEForCausalLM

CACHE_BITS = {"int8": 8, "uint8": 4}  # by the cache's dtype
Stored = dict[str, ir.TensorProtocol | None]
AnyModel = TypeVar("AnyModel", bound=modeling.Model)


def stored_model(reference: AnyModel, bundle: Path, manifest: Manifest) -> AnyModel:
    """A copy of the reference with every quantised or rounded weight replaced by what the bundle's graph stores.

    Raises:
        BundleError: the graph lacks a weight that the manifest says is quantised.
    """
    model = copy.deepcopy(reference)
    if manifest.quantize == "none":
        return model
    config = reference.config
    if (
        isinstance(model, PhiMoEForCausalLM) and config.tie_word_embeddings
    ):  # the bundle stores the two in formats of their own
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    graph = ir.load(bundle / manifest.graphs[0].file).graph
    stored = {name: value.const_value for name, value in graph.initializers.items()}
    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or name.endswith(("gate.weight", "score.weight")):
                continue
            if manifest.quantize == "fp16":
                parameter.copy_(parameter.half())
            else:
                parameter.copy_(_dequantized(name, stored, parameter.shape[-1], sizes).view_as(parameter))
    return model


def _dequantized(name: str, stored: Stored, k: int, sizes: list[int]) -> Tensor:
    """The parameter `name`, whose rows have k columns, from the codes and scales under the name that the passes gave
    them.
    """
    prefix = name.removesuffix(".weight")
    if name.endswith("experts.gate_up_proj"):
        interleaved = _read(prefix.replace("gate_up_proj", "fc1"), stored, k)  # [E, 2 * I, H], gate and up in turns
        return torch.cat((interleaved[:, ::2], interleaved[:, 1::2]), dim=1)
    if name.endswith("experts.down_proj"):
        return _read(prefix.replace("down_proj", "fc2"), stored, k)
    for part, proj in enumerate(("q_proj", "k_proj", "v_proj")):
        if prefix.endswith(proj):
            return torch.split(_read(prefix.replace(proj, "qkv_proj"), stored, k), sizes)[part]
    return _read(prefix, stored, k)


def _read(prefix: str, stored: Stored, k: int) -> Tensor:
    codes, scales = stored.get(f"{prefix}.codes"), stored.get(f"{prefix}.scales")
    if codes is None or scales is None:
        raise BundleError(f"the graph has no codes and scales for {prefix}; export the bundle again")
    scale = torch.from_numpy(scales.numpy().copy())
    code = torch.from_numpy(codes.numpy().copy()).reshape(*scale.shape[:-1], -1)
    return Format(code.shape[-1] * 8 // k, k // scale.shape[-1]).dequantize(code, scale)


@contextmanager
def stored_cache(bundle: Path, manifest: Manifest) -> Iterator[None]:
    """Rounds every key and value in PyTorch as the bundle's cache does; does nothing where they stay as they are."""
    cache = manifest.decoding.cache
    bits = CACHE_BITS.get(cache.dtype)
    if bits is None:
        yield
        return
    graph = ir.load(bundle / manifest.graphs[0].file).graph
    names = [
        f"model.layers.{layer}.self_attn.{part}_cache.scale"
        for layer in range(cache.num_hidden_layers)
        for part in "kv"
    ]
    scales = [torch.from_numpy(graph.initializers[name].const_value.numpy().copy()) for name in names]
    layers = itertools.cycle(zip(scales[::2], scales[1::2], strict=True))
    exact = modeling.attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        visible: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        key_scale, value_scale = next(layers)
        head_dim = past_key.shape[-1]
        query, key, value = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
        query, key = modeling.rotate(query, cos, sin), _rounded(modeling.rotate(key, cos, sin), key_scale, bits)
        query, key, value = (x.transpose(1, 2).flatten(2) for x in (query, key, _rounded(value, value_scale, bits)))
        return exact(query, key, value, torch.ones_like(cos), torch.zeros_like(sin), past_key, past_value, visible)

    with patch.object(modeling, "attention", attention):
        yield


def _rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x [B, K, S, D] as codes of `bits` times the channels' scales."""
    largest = 2 ** (bits - 1)
    return (x / scale).round().clamp(-largest, largest - 1) * scale
