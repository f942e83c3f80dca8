"""Whether an opened graph is the one that the manifest describes: what a loop relies on, found before the first run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from phimoe_onnx import bundle
from phimoe_onnx.errors import BundleError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg

_PAST = "past_key_values"
Dimensions = tuple[int | None, ...]  # None is any
_TYPES = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int8": "int8", "uint8": "uint8"}  # ONNX's


def check_graph(
    session: InferenceSession, manifest: bundle.Manifest, graph: Path, optional_inputs: Collection[str]
) -> None:
    """Holds the session's inputs and outputs against the manifest: names, dtypes, and dimensions that are numbers.

    Raises:
        BundleError: they disagree, or `optional_inputs` are not those with a default.

    """
    inputs = {value.name: value for value in session.get_inputs()}
    defaults = {value.name: value for value in session.get_overridable_initializers()}
    outputs = {value.name: value for value in session.get_outputs()}
    try:
        _check_layers(manifest, inputs)
        wanted = _inputs(manifest)
        optional = {name: wanted.pop(name) for name in optional_inputs if name in wanted}
        if missing := sorted(set(optional_inputs) - defaults.keys()):
            raise ValueError(f"optional_inputs has {missing[0]}, but the graph has no such input with a default")
        _check_names("inputs", wanted.keys(), inputs.keys())
        for name, (dtype, shape) in (wanted | optional).items():
            _check_value(inputs.get(name) or defaults[name], dtype, shape)
        results = _outputs(manifest)
        _check_names("outputs", results.keys(), outputs.keys())
        for name, (dtype, shape) in results.items():
            _check_value(outputs[name], dtype, shape)
    except ValueError as error:
        raise BundleError(
            f"{graph.with_name(bundle.MANIFEST)}: does not describe {graph.name}: {error}; export the bundle again"
        ) from None


def _check_layers(manifest: bundle.Manifest, inputs: Collection[str]) -> None:
    """Counts before any names are made: a damaged manifest may claim a billion layers."""
    layers, found = manifest.decoding.cache.num_hidden_layers, sum(name.startswith(f"{_PAST}.") for name in inputs)
    if manifest.task == "text-generation" and 2 * layers != found:
        raise ValueError(
            f"num_hidden_layers is {layers}, but the graph has a cache of {found} inputs, two for each layer"
        )


def _inputs(manifest: bundle.Manifest) -> dict[str, tuple[str, Dimensions]]:
    texts: dict[str, tuple[str, Dimensions]] = {
        bundle.INPUT_IDS: ("int64", (None, None)),
        bundle.ATTENTION_MASK: ("int64", (None, None)),
    }
    if manifest.task != "text-generation":
        return texts
    return texts | dict.fromkeys(bundle.OPTIONAL_INPUTS, ("int64", (1,))) | _cache(manifest, _PAST)


def _outputs(manifest: bundle.Manifest) -> dict[str, tuple[str, Dimensions]]:
    if manifest.task == "text-generation":
        logits = {bundle.LOGITS: ("float", (None, None, manifest.decoding.vocab_size))}
        return logits | _cache(manifest, "present")
    if manifest.task == "text-classification":
        assert manifest.classes
        return {bundle.LOGITS: ("float", (None, len(manifest.classes.labels)))}
    return {bundle.LAST_HIDDEN_STATE: ("float", (None, None, None))}


def _cache(manifest: bundle.Manifest, prefix: str) -> dict[str, tuple[str, Dimensions]]:
    cache = manifest.decoding.cache
    shape = (None, cache.num_key_value_heads, None, cache.head_dim)
    return dict.fromkeys(bundle.cache_names(cache.num_hidden_layers, prefix), (_TYPES[cache.dtype], shape))


def _check_names(what: str, wanted: Collection[str], found: Collection[str]) -> None:
    for name in wanted:
        if name not in found:
            raise ValueError(f"the graph's {what} lack {name}")
    for name in found:
        if name not in wanted:
            raise ValueError(f"the graph's {what} have {name}, which nobody knows")


def _check_value(value: NodeArg, dtype: str, shape: Dimensions) -> None:
    if value.type != f"tensor({dtype})":
        raise ValueError(f"the dtype of {value.name} is {value.type} in the graph, expected tensor({dtype})")
    if len(value.shape) != len(shape):
        raise ValueError(f"{value.name} has the shape {value.shape} in the graph, expected {len(shape)} dimensions")
    for name, found in _disagreements(value, shape):
        raise ValueError(f"{value.name} has the shape {value.shape} in the graph, so {name} cannot be {found}")


def _disagreements(value: NodeArg, shape: Dimensions) -> Iterator[tuple[str, int]]:
    """Which number of the manifest a dimension of the graph contradicts."""
    names = {bundle.LOGITS: {2: "vocab_size", 1: "the number of labels"}}.get(
        value.name, {1: "num_key_value_heads", 3: "head_dim"}
    )
    for axis, (has, wanted) in enumerate(zip(value.shape, shape, strict=True)):
        if wanted is not None and isinstance(has, int) and has != wanted:
            yield names.get(axis, f"dimension {axis}"), wanted
