"""What each target is made of and takes: the one place that knows targets by name.

A target is a value, and whoever asks for something asks one of its facts. Readers of a bundle know no targets; the
manifest tells them what they need. To add a target, add a value to `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize.format import Format, Plain
from phimoe_onnx.exporter.quantize.strips import Strips

# How the experts may be computed, and the least ONNX Runtime release of each. fused: QMoE knows accuracy_level, without
# which it is slow, from 1.31 on, and so does CUDA's GroupQueryAttention rotate at positions beyond the cache's length,
# where the long factors are. branches: one If an expert, over operators that older releases have. native: our own one.
EXPERTS = {"fused": "1.31", "branches": "1.29", "native": "1.29"}
Experts = Literal["fused", "branches", "native"]
Operators = Literal["stock", "native"]  # whose operators compute with rounded weights
Form = Plain | Format | Strips
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Device:
    """A device that runs a target's graphs with activations of `dtypes`, from ONNX Runtime's release `least` on."""

    name: str
    least: str
    dtypes: tuple[Dtype, ...]


@dataclass(frozen=True)
class Target:
    """A target's facts.

    Attributes:
        name: as `--target` takes it.
        devices: what runs its graphs.
        dtypes: of activations and cache; the first is the default.
        attention: what attention becomes. GroupQueryAttention has one buffer for past and present and takes Q, K and V
            from one packed projection; "standard" is plain operators with a cache that grows.
        rotates: whether GroupQueryAttention itself may rotate in a step with longrope, for a model's shape.
        skip_norm: whether a residual sum and its LayerNorm become SkipLayerNormalization.
        experts: how experts are computed, in order of preference; each is a graph, where the weights allow it.
        no_plain_moe: why the fused MoE is not used for weights that are not quantised; None: it is.
        tile: what the fused QMoE needs hidden_size and intermediate_size to be multiples of.
        blocks: what computes with weights in blocks. MatMulNBits is ONNX Runtime's; DequantizeLinear before a MatMul is
            standard from opset 21 on.
        operators: whose operators there are for rounded weights.
        forms: in which weights may be stored: "none" (as activations), "fp16", "int8" and so on.
        native_forms: what native operators compute with beside them.
        no_form: why others are not there.
        kv_cache: in which keys and values may be: "none" (as activations), "int8", "int4".
        native_kv_cache: what native operators keep beside them.
        no_kv_cache: why others are not there.
        prefill_chunk: how many tokens of a prompt run at once: enough to fill the matrix products; bounds their memory.
        plain_inputs: whether there is a graph without optional inputs, for the languages whose ONNX Runtime takes no
            values for them.
        genai: onnxruntime-genai's provider options; None: there is no genai_config.json.
        sampling_graph: whether tokens are drawn on the device, by a graph of its own.
        expands: whether its device rewrites weights at load, as the CPU does: float16 to float32, and blocks with the
            sums of their codes; else they lie there as they are stored.
        gpu: whether weights and cache lie in a graphics card's memory.
    """

    name: str
    devices: tuple[Device, ...]
    dtypes: tuple[Dtype, ...]
    attention: Literal["GroupQueryAttention", "standard"]
    skip_norm: bool
    experts: tuple[Experts, ...]
    forms: tuple[str, ...]
    kv_cache: tuple[str, ...]
    prefill_chunk: int
    rotates: Callable[[PhiMoEConfig], bool] = lambda config: True
    blocks: Literal["MatMulNBits", "DequantizeLinear"] = "MatMulNBits"
    operators: tuple[Operators, ...] = ("stock",)
    native_forms: tuple[str, ...] = ()
    native_kv_cache: tuple[str, ...] = ()
    no_plain_moe: str | None = None
    tile: int = 1
    no_form: str = ""
    no_kv_cache: str = ""
    plain_inputs: bool = False
    genai: tuple[dict[str, Any], ...] | None = None
    sampling_graph: bool = False
    expands: bool = True
    gpu: bool = False

    @property
    def shared_cache(self) -> bool:
        """Whether past and present may be one buffer."""
        return self.attention == "GroupQueryAttention"

    @property
    def packs_projections(self) -> bool:
        """Whether Q, K and V are one matrix."""
        return self.attention == "GroupQueryAttention"

    def devices_for(self, dtype: Dtype, experts: Experts) -> dict[str, str]:
        """The devices that run a graph with activations of `dtype`, each with its least ONNX Runtime release."""
        return {
            device.name: max(device.least, EXPERTS[experts], key=_release)
            for device in self.devices
            if dtype in device.dtypes
        }

    def activations(self, dtype: str | None) -> Dtype:
        """The dtype of activations and cache: the one that is asked for, else the first.

        Raises:
            ExportError: there is no such dtype here.
        """
        if dtype is None:
            return self.dtypes[0]
        for known in self.dtypes:
            if known == dtype:
                return known
        raise ExportError(f"--target {self.name} has no --dtype {dtype}, expected {' or '.join(self.dtypes)}")

    def forms_for(self, operators: Operators) -> tuple[str, ...]:
        """In which weights may be stored where these operators compute with them."""
        return (*self.forms, *self.native_forms) if operators == "native" else self.forms

    def check(
        self, config: PhiMoEConfig, forms: Collection[str], kv_cache: str, operators: Operators = "stock"
    ) -> None:
        """Raises ExportError, with the reason, for a shape, a form of weights or a form of cache that is not taken."""
        known = self.forms_for(operators)
        if kv_cache not in ((*self.kv_cache, *self.native_kv_cache) if operators == "native" else self.kv_cache):
            raise ExportError(f"--target {self.name} has no --kv-cache {kv_cache}: {self.no_kv_cache}")
        for form in forms:
            if form not in known:
                raise ExportError(f"--target {self.name} has no {form}: {self.no_form}; use {' or '.join(known)}")
        if self.attention == "GroupQueryAttention" and config.head_dim % 16:
            raise ExportError(
                f"head_dim is {config.head_dim}, ONNX Runtime's GroupQueryAttention with rope needs a multiple of 16; "
                f"use --target portable"
            )

    def why_not_fused(self, config: PhiMoEConfig, forms: Collection[Form]) -> str | None:
        """Why the experts' matrices of a layer, in these forms, cannot be one MoE or QMoE; None where they can."""
        if len(set(forms)) > 1:
            found = " and ".join(sorted({str(form) for form in forms}))
            return f"no operator for experts of one layer in several forms, found {found}; store them alike"
        (form,) = set(forms)
        if isinstance(form, Plain):
            return self.no_plain_moe
        if config.hidden_size % self.tile or config.intermediate_size % self.tile:
            return (
                f"no {form.dtype} for hidden_size {config.hidden_size} and intermediate_size "
                f"{config.intermediate_size}: ONNX Runtime's QMoE needs multiples of {self.tile} there; "
                f"use --quantize none"
            )
        return None


def _release(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release.split("."))


def _has_xqa(config: PhiMoEConfig) -> bool:
    """Whether CUDA's GroupQueryAttention steps with its XQA kernel (ONNX Runtime 1.31 on Ampere and later).

    Without it a step with longrope may go to FlashDecoding, which ignores `position_ids`.
    """
    groups = config.num_attention_heads // config.num_key_value_heads
    return groups in (1, 2, 4, 5, 8, 16, 32) and config.head_dim in (64, 128, 256)


CPU = Target(
    name="cpu",
    devices=(Device("cpu", "1.29", ("float32",)),),
    dtypes=("float32",),
    attention="GroupQueryAttention",
    skip_norm=True,
    experts=("fused", "branches"),
    operators=("stock", "native"),
    no_plain_moe="no MoE for plain weights: before ONNX Runtime 1.32 it writes its output over its input",
    forms=("none", "fp16", "int8", "int4", "int2"),
    native_forms=("int3",),
    no_form="ONNX Runtime's operators read 2, 4 and 8 bits, --operators native 3 as well",
    kv_cache=("none", "int8", "int4"),
    native_kv_cache=("fp16",),
    no_kv_cache="ONNX Runtime's attention computes less exactly over it; use --operators native, or int8",
    prefill_chunk=512,
    plain_inputs=True,
    genai=(),
)
CUDA = Target(
    name="cuda",
    # MoE in float16 is right on the CPU from 1.32 on
    devices=(Device("cuda", "1.31", ("float16", "bfloat16")), Device("cpu", "1.32", ("float16",))),
    dtypes=("float16", "bfloat16"),
    attention="GroupQueryAttention",
    rotates=_has_xqa,
    skip_norm=True,
    experts=("fused",),
    tile=64,  # QMoE's packed weights are made of tiles of so many columns
    forms=("none", "fp16", "int8", "int4"),
    no_form="ONNX Runtime's QMoE reads 4 and 8 bits there",
    kv_cache=("none", "int8", "int4"),
    no_kv_cache="its cache has the dtype of the activations, float16 by default; use none",
    prefill_chunk=4096,
    genai=({"cuda": {"enable_cuda_graph": "0", "use_tf32": "0"}},),
    sampling_graph=True,
    expands=False,
    gpu=True,
)
PORTABLE = Target(
    name="portable",
    devices=(Device("cpu", "1.29", ("float32",)), Device("cuda", "1.29", ("float32",))),
    dtypes=("float32",),
    attention="standard",
    skip_norm=False,
    experts=("branches",),
    forms=("none", "fp16", "int8", "int4"),
    no_form="the standard DequantizeLinear reads 4 and 8 bits",
    blocks="DequantizeLinear",
    kv_cache=("none",),
    no_kv_cache="the standard operators keep keys and values as they are",
    prefill_chunk=512,
)
TARGETS = {target.name: target for target in (CPU, CUDA, PORTABLE)}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        ExportError: there is none.
    """
    if name not in TARGETS:
        raise ExportError(f"target is {name!r}, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
