"""How each parameter is stored, decided once, before any work, from the target, the options and config.json.

Everything that stores, counts, plans or reports weights reads the recipe and decides nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

from phimoe_onnx.bundle import NATIVE_OPERATORS, TASKS, StoredWeights
from phimoe_onnx.checkpoint.tensors import shapes
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize.format import WIDTHS, Format, Plain
from phimoe_onnx.exporter.quantize.strips import BLOCK, LARGEST_SUPERBLOCK, Strips
from phimoe_onnx.exporter.target import Dtype, Experts, Form, Operators, Target
from phimoe_onnx.operators import library

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZE = ("none", "fp16", "int8", "int4", "int3", "int2")
INTEGERS = tuple(form for form in QUANTIZE if form.startswith("int"))
KV_CACHE = ("none", "fp16", "int8", "int4")
MIXED = "mixed"  # what stands for one of them where each width is chosen by itself (widths.py)
BLOCK_SIZES = (16, 32, 64, 128, 256)
LARGEST_DEFAULT_BLOCK = 64
# In which MatMulNBits (at accuracy_level 4) and QMoE are fast with 2 bits, in 1.29 and 1.32 on AVX2. In blocks of 16
# both, in blocks of 256 MatMulNBits unpack the weights first, and take some forty times as long for a row.
BLOCK_SIZES_2 = (32, 64, 128)
ROUTER = "gate.weight"
EXACT = (ROUTER, "score.weight")  # router and a classifier's head: float32 in every form, a tie would decide
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
NO_LIBRARY = (
    "the library of the native operators is not built here, so the operators are ONNX Runtime's, which are slower on "
    "the CPU; install Rust's cargo and then phimoe-onnx again, or ask for --operators stock"
)

# (rows [..., N, K], form, parameter's name in modeling.py, expert) -> codes, scales and, without form.symmetric, zeros,
# as format.py lays them out, or strips. It may be given a parameter's matrix in several calls of some rows each.
RoundRows = Callable[["Tensor", Any, str, "int | None"], tuple["Tensor", ...]]


@dataclass(frozen=True)
class Rounding:
    """A way to round: where its function is, as "module:name" (it needs torch, a recipe does not), and its codes.

    Attributes:
        operators: whose layouts it knows.
        largest_block: the most weights that share a scale, where the grid sets a limit; it sets none to 2 bits of ONNX
            Runtime's operators, which are on no grid.
        stock_bits: the widths that it gives ONNX Runtime's operators.
    """

    function: str
    symmetric: bool = True
    operators: tuple[Operators, ...] = ("stock",)
    largest_block: int = max(BLOCK_SIZES)
    stock_bits: tuple[int, ...] = (2, 4, 8)


CALIBRATED = "calibrated"  # what calibrate.py found, read again
ROUNDINGS = {
    "rtn": Rounding("phimoe_onnx.exporter.quantize.rtn:round_to_nearest"),
    "two-level": Rounding(
        "phimoe_onnx.exporter.quantize.levels:round_to_levels",
        operators=("native", "stock"),
        largest_block=BLOCK,
    ),
    CALIBRATED: Rounding(
        "phimoe_onnx.exporter.quantize.calibrated:round_calibrated",
        operators=("native", "stock"),
        largest_block=BLOCK,
        stock_bits=(4, 8),  # the levels of 2 bits are of the native operators alone
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How a bundle is made.

    Attributes:
        target: what it is for.
        task: one of bundle.TASKS.
        quantize: the option that `forms` follow where `store` says nothing else, or MIXED.
        dtype: of activations.
        kv_cache: one of KV_CACHE.
        operators: whose operators compute with rounded weights, ONNX Runtime's ("stock") or this project's ("native").
        rounding: one of ROUNDINGS.
        forms: modeling.py's name of each parameter -> its form; of a stack of experts each expert's.
        experts: how experts can be computed with these forms; each is a graph.
        calibration: a hash of what a calibration sees; "" without one.
    """

    target: Target
    task: str
    quantize: str
    dtype: Dtype
    kv_cache: str
    operators: Operators
    rounding: str
    forms: Mapping[str, tuple[Form, ...]]
    experts: tuple[Experts, ...]
    calibration: str = ""

    def form(self, parameter: str, expert: int | None = None) -> Form:
        """How a parameter is stored; of a stack of experts the one of `expert`, or of all where they are alike."""
        return self.forms[parameter][expert or 0]

    def alike(self, parameter: str) -> bool:
        """Whether all experts of a stack are stored in one form; true of any other parameter."""
        return len(set(self.forms[parameter])) == 1

    def round_rows(self) -> RoundRows:
        """The function that rounds."""
        module, _, name = ROUNDINGS[self.rounding].function.partition(":")
        function: RoundRows = getattr(import_module(module), name)
        return function

    @property
    def evens_gains(self) -> bool:
        """Whether weights are those of even gains (gains.py): where kernels round a row's numbers by a common scale,
        and where other operators are to have the same weights.
        """
        integers = any(not isinstance(form, Plain) for forms in self.forms.values() for form in forms)
        return "native" in self.target.operators and self.rounding != "rtn" and integers

    @property
    def native_attention(self) -> bool:
        """Whether attention is a native operator, too. Over an int4 cache, and over whole texts without a cache, it
        stays ONNX Runtime's.
        """
        return self.operators == "native" and self.task == "text-generation" and self.kv_cache != "int4"

    @property
    def draws_on_device(self) -> bool:
        """Whether the bundle has a graph that draws tokens."""
        return self.task == "text-generation" and self.target.sampling_graph

    @property
    def dequantizes(self) -> bool:
        """Whether DequantizeLinear is what reads weights in blocks, and some are."""
        forms = {form for each in self.forms.values() for form in each}
        return self.target.blocks == "DequantizeLinear" and any(isinstance(form, Format) for form in forms)

    def graphs(self) -> dict[str, tuple[Experts, bool]]:
        """The bundle's graphs by file, in order of preference: how each computes experts, and if it has optional
        inputs.
        """
        cached = self.task == "text-generation"
        files: dict[str, tuple[Experts, bool]] = {"model.onnx": (self.experts[0], cached)}
        if len(self.experts) > 1 or (cached and self.target.plain_inputs):
            other = "model.plain.onnx" if self.experts[-1] == "native" else "model.branches.onnx"
            files[other] = (self.experts[-1], cached and not self.target.plain_inputs)
        return files

    @property
    def requires(self) -> tuple[str, ...]:
        """What the graphs need beyond ONNX Runtime."""
        return (NATIVE_OPERATORS,) if self.operators == "native" else ()

    def stored_weights(self) -> tuple[StoredWeights, ...]:
        """The manifest's `weights`: parameters of one form together, runs of equal layers together."""
        layers: dict[int, dict[str, Form]] = {}
        others: dict[str, Form] = {}
        for name, form in self._entries():
            if match := LAYER.match(name):
                layers.setdefault(int(match[1]), {})[name[match.end() :]] = form
            else:
                others[name] = form
        runs: list[tuple[int, int]] = []
        for layer in sorted(layers):
            if runs and layers[runs[-1][0]] == layers[layer]:
                runs[-1] = (runs[-1][0], layer)
            else:
                runs.append((layer, layer))
        groups = [group for run in runs for group in _groups(layers[run[0]], run)]
        return (*groups, *_groups(others, None))

    def digest(self) -> str:
        """A SHA-256 of everything that decides what is written; two recipes with one digest store the same."""
        facts = [self.target.name, self.task, self.dtype, self.kv_cache, self.rounding, self.experts]
        facts += [self.calibration] if self.calibration else []
        forms = {name: repr(form) for name, form in self._entries()}
        return hashlib.sha256(json.dumps([facts, forms], sort_keys=True).encode()).hexdigest()

    def _entries(self) -> Iterator[tuple[str, Form]]:
        """Each parameter's form by name; experts that differ are called NAME.EXPERT."""
        for name, forms in self.forms.items():
            if len(set(forms)) == 1:
                yield name, forms[0]
            else:
                yield from ((f"{name}.{expert}", form) for expert, form in enumerate(forms))


def _groups(forms: Mapping[str, Form], layers: tuple[int, int] | None) -> Iterator[StoredWeights]:
    for form in dict.fromkeys(forms.values()):
        names = tuple(name for name, other in forms.items() if other == form)
        if isinstance(form, Plain):
            yield StoredWeights(names, layers, form.dtype)
        elif isinstance(form, Strips):
            yield StoredWeights(names, layers, form.dtype, BLOCK, "bfloat16", layout="strips")
        else:
            yield StoredWeights(names, layers, form.dtype, form.block_size, form.scale_dtype, form.symmetric)


def recipe_for(
    config: PhiMoEConfig,
    target: Target,
    quantize: str = "none",
    *,
    task: str = "text-generation",
    block_size: int | None = None,
    kv_cache: str = "none",
    dtype: str | None = None,
    store: Mapping[str, str] | None = None,
    operators: str | None = None,
    rounding: str | None = None,
    calibrate: bool = False,
) -> Recipe:
    """Decides how a checkpoint of this shape is stored; options are those of `export`, whose `operators` None is what
    `default_operators` says.

    Raises:
        ExportError: an option is unknown, or the target or its operators do not take it; it says why.
    """
    if operators is None:
        options: dict[str, Any] = {"task": task, "block_size": block_size, "kv_cache": kv_cache, "dtype": dtype}
        options |= {"store": store, "rounding": rounding, "calibrate": calibrate}
        operators, _ = default_operators(config, target, [quantize], **options)
    store = store or {}
    wanted = (quantize, *store.values())
    chosen = _operators(target, operators, wanted, block_size)
    rounding = rounding or (CALIBRATED if calibrate else default_rounding(target, chosen, wanted))
    _check_options(task, kv_cache, quantize, store, chosen, rounding)
    target.check(config, wanted, kv_cache, chosen)
    activations = target.activations(dtype)
    _check_calibration(calibrate, rounding, wanted, activations)
    blocks = any(form.startswith("int") for form in wanted)
    sizes = _block_sizes(config, block_size, rounding, wanted) if blocks else {}
    if chosen == "stock" and "int2" in wanted and sizes[2] not in BLOCK_SIZES_2:
        raise ExportError(
            f"int2 in blocks of {sizes[2]}: ONNX Runtime is fast in blocks of 32, 64 and 128 alone; use another "
            f"--block-size, int4, or --operators native"
        )

    def form(name: str, parameter: str = "") -> Form:
        if name.startswith("int") and chosen == "native" and parameter != EMBEDDING:
            return Strips(int(name[3:]))
        if name.startswith("int"):
            bits = int(name[3:])
            return Format(bits, sizes[bits], activations, ROUNDINGS[rounding].symmetric)
        return Plain("float16" if name == "fp16" and activations == "float32" else activations)

    known = shapes(config, task)
    if task == "text-generation" and config.tie_word_embeddings:  # the two uses are stored apart, each as it is read
        known[HEAD] = known[EMBEDDING]
    forms: dict[str, tuple[Form, ...]] = {}
    for name, shape in known.items():
        if name.endswith(EXACT):
            default: Form = Plain("float32")
        elif not is_matrix(name, shape):
            default = Plain(activations)
        else:
            default = form("int8" if name == EMBEDDING and quantize.startswith("int") else quantize, name)
        forms[name] = (default,) * (shape[0] if len(shape) == 3 else 1)
    for pattern, stored in store.items():
        _override(forms, known, pattern, stored, partial(form, stored))
    embedding = forms[EMBEDDING][0]
    if isinstance(embedding, Format) and embedding.bits < 4:
        raise ExportError(f"--store: {EMBEDDING} is {embedding}; it is stored as none, fp16, int8 or int4")
    if isinstance(embedding, Format) and target.blocks == "DequantizeLinear" and embedding.bits != 8:
        raise ExportError(
            f"--store: {EMBEDDING} is {embedding}; the standard Gather takes int8 and no int4, store it as int8"
        )
    if blocks and target.blocks == "DequantizeLinear" and not ROUNDINGS[rounding].symmetric:
        raise ExportError(f"rounding is {rounding!r}, whose zero points --target {target.name} does not take yet")
    if target.packs_projections:
        _check_packed(config, forms)
    experts = _native(config, forms) if chosen == "native" else _experts(config, target, forms)
    return Recipe(target, task, quantize, activations, kv_cache, chosen, rounding, forms, experts)


def default_operators(
    config: PhiMoEConfig, target: Target, forms: Iterable[str], **options: Any
) -> tuple[Operators, bool]:
    """What computes with rounded weights where nobody says it: native operators where their library is and a whole
    graph can be of them, attention too, which is what was measured to be faster (docs/native.md); else stock ones.

    Args:
        config: the checkpoint's shape.
        target: what the bundle is for.
        forms: each `quantize` that they must take.
        options: the others of `recipe_for`, but for `operators`.

    Returns:
        The operators, and whether they are stock only because the library is not here.
    """
    try:
        recipes = [recipe_for(config, target, form, **options, operators="native") for form in forms]
    except ExportError:  # if stock operators refuse it too, they say why
        return "stock", False
    if not all(recipe.native_attention for recipe in recipes):
        return "stock", False
    return ("stock", True) if library() is None else ("native", False)


def default_rounding(target: Target, operators: Operators, forms: Collection[str]) -> str:
    """The rounding of weights in these forms, such as "int4", where none is asked for.

    Where a target has both kinds of operators int4 is on the grid that they share, so that bundles of the two are one
    model.
    """
    shared = "native" in target.operators and "int4" in forms
    return "two-level" if operators == "native" or shared else "rtn"


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter may be stored in another form than float32 or that of the activations."""
    return len(shape) > 1 and not name.endswith(EXACT)


def bits_per_weight(form: Form) -> float:
    """With a block's share of its scale and its zero point."""
    if isinstance(form, Plain):
        return 8 * WIDTHS[form.dtype]
    if isinstance(form, Strips):
        return form.bits + (0 if form.bits == 8 else 4 / BLOCK) + 16 / LARGEST_SUPERBLOCK
    beside = 8 * WIDTHS[form.scale_dtype] + (0 if form.symmetric else form.bits)
    return form.bits + beside / form.block_size


def _operators(target: Target, operators: str, forms: tuple[str, ...], block_size: int | None) -> Operators:
    """The ones that are asked for.

    Raises:
        ExportError: there are none of that name, or they do not run this.
    """
    for known in target.operators:
        if known == operators == "native":
            if not any(form.startswith("int") for form in forms):
                raise ExportError(
                    "--operators native computes with weights of int2 to int8, and none are asked for; use --quantize "
                    "int4, or --operators stock"
                )
            if block_size not in (None, BLOCK):
                raise ExportError(f"--block-size is {block_size}, but --operators native has blocks of {BLOCK}")
        if known == operators:
            return known
    if operators not in get_args(Operators):
        raise ExportError(f"--operators is {operators!r}, expected {' or '.join(get_args(Operators))}")
    raise ExportError(f"--target {target.name} has no --operators {operators}; use {' or '.join(target.operators)}")


def _check_options(
    task: str, kv_cache: str, quantize: str, store: Mapping[str, str], operators: Operators, rounding: str
) -> None:
    if task not in TASKS:
        raise ExportError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    if quantize not in QUANTIZE:
        raise ExportError(f"quantize is {quantize!r}, expected one of {', '.join(QUANTIZE)}")
    for pattern, form in store.items():
        if form not in QUANTIZE:
            raise ExportError(f"--store {pattern}={form}: expected one of the forms {', '.join(QUANTIZE)}")
    if kv_cache not in KV_CACHE:
        raise ExportError(f"kv_cache is {kv_cache!r}, expected one of {', '.join(KV_CACHE)}")
    if rounding not in ROUNDINGS:
        raise ExportError(f"rounding is {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    if operators not in ROUNDINGS[rounding].operators:
        raise ExportError(f"rounding is {rounding!r}, --operators {operators} takes 'two-level'")
    if operators == "stock" and "int2" in (quantize, *store.values()) and 2 not in ROUNDINGS[rounding].stock_bits:
        raise ExportError(
            f"rounding is {rounding!r}, whose 2 bits the native operators alone read; for int2 --operators stock takes "
            f"'rtn'"
        )
    if task != "text-generation" and kv_cache != "none":
        raise ExportError(f"--task {task} has no --kv-cache {kv_cache}: it runs whole texts without a cache")


def _check_calibration(calibrate: bool, rounding: str, forms: tuple[str, ...], activations: str) -> None:
    if not calibrate and rounding == CALIBRATED:
        raise ExportError(f"rounding is {CALIBRATED!r}, which needs --calibrate")
    if calibrate and rounding != CALIBRATED:
        raise ExportError(
            f"--calibrate finds the rounding on the grid of two-level, but --rounding {rounding} is asked for, which "
            f"looks at no text; leave one of the two out"
        )
    if calibrate and not any(form.startswith("int") for form in forms):
        raise ExportError(
            "--calibrate is for weights that are rounded to integers, and none are asked for; use --quantize int4"
        )
    if calibrate and activations != "float32":
        raise ExportError(
            f"--calibrate finds scales that float32 holds, but with activations in {activations} they would be rounded "
            f"to that; use --target cpu or portable, or leave --calibrate out"
        )


def _block_sizes(config: PhiMoEConfig, block_size: int | None, rounding: str, forms: Collection[str]) -> dict[int, int]:
    """Of each width that these forms need; embeddings are 8 bits wide with all of them."""
    limits = {8: ROUNDINGS[rounding].largest_block}
    for form in forms:
        if form.startswith("int"):
            bits = int(form[3:])
            limits[bits] = max(BLOCK_SIZES) if bits == 2 else ROUNDINGS[rounding].largest_block
    return {bits: _block_size(config, block_size, largest) for bits, largest in limits.items()}


def _block_size(config: PhiMoEConfig, block_size: int | None, largest: int) -> int:
    """The one that is asked for, else the largest number up to 64 that divides the rows of all matrices; a rounding has
    none above `largest`.
    """
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
    }
    fitting = [size for size in BLOCK_SIZES if size <= largest and not any(width % size for width in widths.values())]
    if block_size is None:
        block_size = max((size for size in fitting if size <= LARGEST_DEFAULT_BLOCK), default=LARGEST_DEFAULT_BLOCK)
    if block_size > largest and not any(width % block_size for width in widths.values()):
        raise ExportError(
            f"--block-size is {block_size}, but on the two-level grid {' or '.join(map(str, fitting))} weights share a "
            f"scale; use one of these, or --rounding rtn"
        )
    if block_size not in fitting:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ExportError(
            f"--block-size is {block_size}, but it must divide {found}; choose from {fitting or 'none: use fp16'}"
        )
    return block_size


def _override(
    forms: dict[str, tuple[Form, ...]],
    known: Mapping[str, tuple[int, ...]],
    pattern: str,
    stored: str,
    form: Callable[[str], Form],
) -> None:
    """Puts `form` in the place of what stands for the matrices that `pattern` matches, whole or as NAME.EXPERT."""
    matched = fixed = None
    for name, before in list(forms.items()):
        whole = fnmatchcase(name, pattern)
        stack = len(known[name]) == 3
        experts = [whole or (stack and fnmatchcase(f"{name}.{expert}", pattern)) for expert in range(len(before))]
        if not any(experts):
            continue
        if not is_matrix(name, known[name]):
            fixed = name
            continue
        matched = name
        forms[name] = tuple(form(name) if chosen else old for chosen, old in zip(experts, before, strict=True))
    if matched is None and fixed is None:
        raise ExportError(
            f"--store {pattern}={stored}: no parameter is called so; names are those of modeling.py, such as {HEAD} "
            f"or model.layers.0.self_attn.o_proj.weight"
        )
    if matched is None:
        raise ExportError(
            f"--store {pattern}={stored}: {fixed} is always {forms[str(fixed)][0]}; only matrices but the router and "
            f"a classifier's head are stored in other forms"
        )


def _check_packed(config: PhiMoEConfig, forms: Mapping[str, tuple[Form, ...]]) -> None:
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        found = {part: forms[f"{prefix}{part}_proj.weight"][0] for part in "qkv"}
        if len(set(found.values())) > 1:
            stored = ", ".join(f"{part}_proj {form}" for part, form in found.items())
            raise ExportError(
                f"--store: {prefix} has {stored}; GroupQueryAttention takes the three as one matrix, store them alike"
            )


def _native(config: PhiMoEConfig, forms: Mapping[str, tuple[Form, ...]]) -> tuple[Experts, ...]:
    """The native operators' way to compute experts; raises ExportError where these forms do not allow it."""
    for layer in range(config.num_hidden_layers):
        for stack in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{stack}"
            found = sorted({str(form) for form in forms[name]})
            if len(found) > 1 or not isinstance(forms[name][0], Strips):
                raise ExportError(
                    f"{name} is stored as {' and '.join(found)}; --operators native takes the experts of a layer all "
                    f"as one of int8, int4, int3 and int2"
                )
    return ("native",)


def _experts(config: PhiMoEConfig, target: Target, forms: Mapping[str, tuple[Form, ...]]) -> tuple[Experts, ...]:
    """The ways of the target that these forms allow; every layer must allow it.

    Raises:
        ExportError: none is left.
    """
    if "fused" not in target.experts:
        return target.experts
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        reason = target.why_not_fused(config, forms[f"{prefix}gate_up_proj"] + forms[f"{prefix}down_proj"])
        if reason is None:
            continue
        others = tuple(way for way in target.experts if way != "fused")
        if not others:
            raise ExportError(f"--target {target.name} has {reason}")
        return others
    return target.experts
