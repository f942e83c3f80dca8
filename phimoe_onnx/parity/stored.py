"""The weights and the cache that a bundle really stores, back in PyTorch: quantisation error without kernel error."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from phimoe_onnx import modeling
from phimoe_onnx.bundle import Manifest, StoredWeights
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import BundleError
from phimoe_onnx.exporter.gains import READERS
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import ROUTER
from phimoe_onnx.layered import Attention, Read
from phimoe_onnx.modeling import AnyModel, PhiMoEForCausalLM, with_seams
from phimoe_onnx.parity.strips import from_strips, stripped_name
from phimoe_onnx.reference import fill

# a calibration refits routers; gains.py moves gains from norms into what reads them
CHANGED = (ROUTER, *(f"{norm}.{part}" for norm in READERS for part in ("weight", "bias")))
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
    return coarse or manifest.decoding.cache.dtype in CACHE_BITS or _caches_half(manifest)


def stored_weights(read: Read, bundle: Path, manifest: Manifest, config: PhiMoEConfig) -> Read:
    """The parameters of the checkpoint that `read` reads, as the bundle's graph stores those that are quantised or
    rounded, and those that the exporter may have changed with them.

    Raises:
        BundleError: the graph lacks a weight that the manifest says is quantised; when that is read.
    """
    forms, stored = stored_as(manifest), _initializers(bundle, manifest)

    def read_stored(name: str, expert: int | None) -> Tensor:
        form = forms.get(name) or forms.get(f"{name}.{expert}")  # version 1 of the manifest has not all of them
        if form is not None and form.layout == "strips":
            packed = _numbers(_known(stored, [stripped_name(name)], form), expert)
            return from_strips(name, packed, forms, config)
        if form is not None and form.block_size is not None:
            return _dequantized(name, expert, form, stored, config)
        if name.endswith(CHANGED):
            for own in (name, f"{name}.transposed"):
                if (tensor := stored.get(own)) is not None:
                    numbers = _numbers(tensor).float()
                    return numbers if own == name else numbers.T.contiguous()
            if manifest.calibration is not None and name.endswith(ROUTER):  # the checkpoint's is another
                _known(stored, [name], forms[name])
        rows = read(name, expert)
        return rows.half().float() if form is not None and _is_half(form, manifest) else rows

    return read_stored


def stored_attention(bundle: Path, manifest: Manifest) -> Callable[[int], Attention]:
    """What each layer attends with, by its number: with keys and values rounded as the bundle's cache rounds them.

    Raises:
        BundleError: the graph lacks the scales of a cache that the manifest says is quantised.
    """
    cache = manifest.decoding.cache
    bits = CACHE_BITS.get(cache.dtype)
    if _caches_half(manifest):
        return lambda layer: partial(_rounding_attention, _halved, _halved)
    if bits is None:
        return lambda layer: modeling.attention
    stored = _initializers(bundle, manifest)
    rounding = []
    for layer, part in itertools.product(range(cache.num_hidden_layers), "kv"):
        name = f"model.layers.{layer}.self_attn.{part}_cache.scale"
        if (tensor := stored.get(name)) is None:
            raise BundleError(f"the graph has no {name}, but the manifest says {cache.dtype}; export the bundle again")
        rounding.append(partial(_rounded, _numbers(tensor), bits))
    return lambda layer: partial(_rounding_attention, rounding[2 * layer], rounding[2 * layer + 1])


def stored_model(reference: AnyModel, bundle: Path, manifest: Manifest) -> AnyModel:
    """A copy of the reference, as one model, with `stored_weights` and `stored_attention`.

    Raises:
        BundleError: as for these.
    """
    model = copy.deepcopy(reference)
    if not is_rounded(manifest):
        return model
    config = reference.config
    parameters: dict[str, Tensor] = reference.state_dict()
    if isinstance(model, PhiMoEForCausalLM) and config.tie_word_embeddings:  # the two are stored apart
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())

    def read(name: str, expert: int | None) -> Tensor:
        return parameters[name] if expert is None else parameters[name][expert]

    fill(model, stored_weights(read, bundle, manifest, config))
    attention, layers = stored_attention(bundle, manifest), itertools.cycle(range(config.num_hidden_layers))
    # a pass calls it once a layer, in their order
    return with_seams(
        model, dataclasses.replace(model.seams, attention=lambda *tensors: attention(next(layers))(*tensors))
    )


def _initializers(bundle: Path, manifest: Manifest) -> Initializers:
    model = ir.load(bundle / manifest.graphs[0].file)
    return {name: value.const_value for graph in model.graphs() for name, value in graph.initializers.items()}


def _is_half(form: StoredWeights, manifest: Manifest) -> bool:
    return form.dtype == "float16" and manifest.dtype == "float32"


def _caches_half(manifest: Manifest) -> bool:
    return manifest.decoding.cache.dtype == "float16" and manifest.dtype == "float32"


def _dequantized(
    name: str, expert: int | None, form: StoredWeights, stored: Initializers, config: PhiMoEConfig
) -> Tensor:
    """A parameter, or the matrix of one expert, from the blocks under the names that the passes gave them."""
    prefix = name.removesuffix(".weight")
    if name.endswith("experts.gate_up_proj"):
        turns = _read(prefix.replace("gate_up_proj", "fc1"), expert, form, stored)
        return torch.cat((turns[::2], turns[1::2]))  # gate and up in turns
    if name.endswith("experts.down_proj"):
        return _read(prefix.replace("down_proj", "fc2"), expert, form, stored)
    packed = f"{prefix.rpartition('.')[0]}.qkv_proj"
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and f"{packed}.codes" in stored:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = torch.split(_read(packed, None, form, stored), [number * config.head_dim for number in heads])
        return parts["qkv".index(prefix.rpartition(".")[2][0])]
    return _read(prefix, None, form, stored)


def _read(prefix: str, expert: int | None, form: StoredWeights, stored: Initializers) -> Tensor:
    """float32 [N, K]: a matrix of its own, or that of one expert in a stack of all."""
    format = Format(int(form.dtype.removeprefix("int")), form.block_size or 0, symmetric=form.symmetric)
    number = "" if expert is None else f".{expert}"
    if (levels := stored.get(f"{prefix}.levels{number}")) is not None:  # of standard operators: signed, [K, N]
        scales = _numbers(_known(stored, [f"{prefix}.scales{number}"], form))
        signed = torch.from_numpy(levels.numpy().astype("float32"))
        if levels.shape[0] == scales.shape[0]:  # an embedding's rows
            return signed * scales.repeat_interleave(format.block_size, dim=1)
        return (signed * scales.repeat_interleave(format.block_size, dim=0)).T
    parts = []
    for kind in ("codes", "scales") if form.symmetric else ("codes", "scales", "zeros"):
        own, stack = f"{prefix}.{kind}{number}", f"{prefix}.{kind}"
        tensor = _known(stored, [own, stack], form)
        parts.append(_numbers(tensor, expert if own not in stored else None))
    codes, scales, *zeros = parts
    return format.dequantize(codes.reshape(*scales.shape[:-1], -1), scales, *zeros)


def _known(stored: Initializers, names: list[str], form: StoredWeights) -> ir.TensorProtocol:
    """The first of the names that the graph has."""
    for name in names:
        if (tensor := stored.get(name)) is not None:
            return tensor
    raise BundleError(f"the graph has no {names[0]}, but the manifest says {form.dtype}; export the bundle again")


def _numbers(tensor: ir.TensorProtocol, index: int | None = None) -> Tensor:
    """A copy of a tensor, or of one matrix of a stack; the file is not kept in memory behind it."""
    array = tensor.numpy()
    numbers = torch.from_numpy((array if index is None else array[index]).copy())
    del array
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return numbers


def _rounding_attention(
    round_key: Callable[[Tensor], Tensor],
    round_value: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`modeling.attention` over keys and values [B, K, S, D] that are rounded by these."""
    head_dim = past_key.shape[-1]
    query, key, value = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
    query, key = modeling.rotate(query, cos, sin), round_key(modeling.rotate(key, cos, sin))
    query, key, value = (x.transpose(1, 2).flatten(2) for x in (query, key, round_value(value)))
    still = torch.ones_like(cos), torch.zeros_like(sin)  # they are rotated
    return modeling.attention(query, key, value, *still, past_key, past_value, visible)


def _halved(x: Tensor) -> Tensor:
    return x.half().float()


def _rounded(scale: Tensor, bits: int, x: Tensor) -> Tensor:
    """x [B, K, S, D] as codes of `bits` times the channels' scales [1, K, 1, D]."""
    largest = 2 ** (bits - 1)
    return (x / scale).round().clamp(-largest, largest - 1) * scale
