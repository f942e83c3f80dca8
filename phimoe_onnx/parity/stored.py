"""The weights and the cache that a bundle really stores, back in PyTorch: quantisation error without kernel error."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from phimoe_onnx import modeling
from phimoe_onnx.bundle import Manifest, StoredWeights
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import BundleError
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.modeling import AnyModel, PhiMoEForCausalLM, with_seams
from phimoe_onnx.parity.strips import from_strips, stripped_name

CACHE_BITS = {"int8": 8, "uint8": 4}  # by the cache's dtype
Initializers = dict[str, ir.TensorProtocol | None]


def stored_as(manifest: Manifest) -> dict[str, StoredWeights]:
    """How each parameter is stored, by its name in modeling.py; of experts that differ each is called NAME.EXPERT.

    Raises:
        BundleError: the manifest tells of layers that the bundle has not.
    """
    layers = manifest.decoding.cache.num_hidden_layers
    for group in manifest.weights:
        if group.layers is not None and not 0 <= group.layers[0] <= group.layers[1] < layers:
            raise BundleError(
                f"manifest.json: weights tells of the layers {list(group.layers)}, but there are {layers}; export the "
                f"bundle again"
            )
    return {name: group for group in manifest.weights for name in group.names()}


def is_rounded(manifest: Manifest) -> bool:
    """Whether what a bundle stores, weights or cache, is rounded more than its activations are."""
    coarse = any(group.block_size or _is_half(group, manifest) for group in manifest.weights)
    return coarse or manifest.decoding.cache.dtype in CACHE_BITS


def stored_model(reference: AnyModel, bundle: Path, manifest: Manifest) -> AnyModel:
    """A copy of the reference with every quantised or rounded weight replaced by what the bundle's graph stores, whose
    keys and values are rounded as the bundle's cache rounds them.

    Raises:
        BundleError: the graph lacks a weight that the manifest says is quantised.
    """
    model = copy.deepcopy(reference)
    if not is_rounded(manifest):
        return model
    config, forms = reference.config, stored_as(manifest)
    initializers = ir.load(bundle / manifest.graphs[0].file).graph.initializers
    stored: Initializers = {name: value.const_value for name, value in initializers.items()}
    if isinstance(model, PhiMoEForCausalLM) and config.tie_word_embeddings:  # the two are stored apart
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for rows, form, expert in _matrices(name, parameter, forms):
                if form.layout == "strips":
                    packed = _tensor(stripped_name(name), form, stored)
                    rows.copy_(from_strips(name, packed, forms, config, expert))
                elif form.block_size is not None:
                    rows.copy_(_dequantized(name, expert, form, stored, config).view_as(rows))
                elif _is_half(form, manifest):
                    rows.copy_(rows.half())
    return with_stored_cache(model, stored, manifest)


def _is_half(form: StoredWeights, manifest: Manifest) -> bool:
    return form.dtype == "float16" and manifest.dtype == "float32"


def _matrices(
    name: str, parameter: Tensor, forms: dict[str, StoredWeights]
) -> list[tuple[Tensor, StoredWeights, int | None]]:
    """The parameter, or each expert's matrix of it where the experts differ, with its form; nothing where version 1 of
    the manifest has none.
    """
    if name in forms:
        return [(parameter, forms[name], None)]
    experts = [(matrix, forms.get(f"{name}.{expert}"), expert) for expert, matrix in enumerate(parameter)]
    return [(matrix, form, expert) for matrix, form, expert in experts if form] if parameter.ndim == 3 else []


def _dequantized(
    name: str, expert: int | None, form: StoredWeights, stored: Initializers, config: PhiMoEConfig
) -> Tensor:
    """A parameter, or the matrix of one expert, from the blocks under the names that the passes gave them."""
    prefix = name.removesuffix(".weight")
    if name.endswith("experts.gate_up_proj"):
        turns = _read_experts(prefix.replace("gate_up_proj", "fc1"), expert, form, stored, config)
        return torch.cat((turns[..., ::2, :], turns[..., 1::2, :]), dim=-2)  # gate and up in turns
    if name.endswith("experts.down_proj"):
        return _read_experts(prefix.replace("down_proj", "fc2"), expert, form, stored, config)
    packed = f"{prefix.rpartition('.')[0]}.qkv_proj"
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and f"{packed}.codes" in stored:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = torch.split(_read(packed, None, form, stored), [number * config.head_dim for number in heads])
        return parts["qkv".index(prefix.rpartition(".")[2][0])]
    return _read(prefix, None, form, stored)


def _read_experts(
    prefix: str, expert: int | None, form: StoredWeights, stored: Initializers, config: PhiMoEConfig
) -> Tensor:
    """A matrix [N, K], or the stack of all, which a graph of branches has as a matrix an expert."""
    if expert is not None or f"{prefix}.codes" in stored:
        return _read(prefix, expert, form, stored)
    return torch.stack([_read(prefix, e, form, stored) for e in range(config.num_local_experts)])


def _read(prefix: str, expert: int | None, form: StoredWeights, stored: Initializers) -> Tensor:
    """float32 [..., N, K]."""
    format = Format(int(form.dtype.removeprefix("int")), form.block_size or 0, symmetric=form.symmetric)
    kinds = ("codes", "scales") if form.symmetric else ("codes", "scales", "zeros")
    names = [f"{prefix}.{kind}" + ("" if expert is None else f".{expert}") for kind in kinds]
    codes, scales, *zeros = (_tensor(name, form, stored) for name in names)
    return format.dequantize(codes.reshape(*scales.shape[:-1], -1), scales, *zeros)


def _tensor(name: str, form: StoredWeights, stored: Initializers) -> Tensor:
    if (tensor := stored.get(name)) is None:
        raise BundleError(f"the graph has no {name}, but the manifest says {form.dtype}; export the bundle again")
    return torch.from_numpy(tensor.numpy().copy())


def with_stored_cache(model: AnyModel, stored: Initializers, manifest: Manifest) -> AnyModel:
    """The model with every key and value rounded as the bundle's cache does; itself where they stay as they are."""
    cache = manifest.decoding.cache
    bits = CACHE_BITS.get(cache.dtype)
    if bits is None:
        return model
    scales = []
    for layer, part in itertools.product(range(cache.num_hidden_layers), "kv"):
        name = f"model.layers.{layer}.self_attn.{part}_cache.scale"
        if (tensor := stored.get(name)) is None:
            raise BundleError(f"the graph has no {name}, but the manifest says {cache.dtype}; export the bundle again")
        scales.append(torch.from_numpy(tensor.numpy().copy()))
    return with_seams(model, dataclasses.replace(model.seams, attention=_rounding_attention(model.seams, scales, bits)))


def _rounding_attention(
    seams: modeling.Seams, scales: list[Tensor], bits: int
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Attention over keys and values of `bits`; a pass calls it once a layer, in their order."""
    layers = itertools.cycle(zip(scales[::2], scales[1::2], strict=True))

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
        still = torch.ones_like(cos), torch.zeros_like(sin)  # they are rotated
        return seams.attention(query, key, value, *still, past_key, past_value, visible)

    return attention


def _rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x [B, K, S, D] as codes of `bits` times the channels' scales."""
    largest = 2 ** (bits - 1)
    return (x / scale).round().clamp(-largest, largest - 1) * scale
