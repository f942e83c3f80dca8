"""Traces modeling.py, for text generation with KV-cache inputs, into an onnx_ir.Model; no weight is allocated.

Attention, SparseMixer and the experts stay one node each, calls of the functions in functions.py, so that a pass
matches a node and not thirty.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from phimoe_onnx import bundle, modeling
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.functions import DOMAIN, FUNCTIONS, OPSET
from phimoe_onnx.exporter.recipe import EMBEDDING, HEAD
from phimoe_onnx.exporter.weights import FLOATS, Parameter, parts_of

Contract = dict[str, tuple[str | int, ...]]  # names and dimensions


def trace(
    config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]], dtype: ir.DataType, task: str = "text-generation"
) -> ir.Model:
    """The graph of the task's model in modeling.py in `dtype`, with the inputs and outputs that bundle.py names.

    Args:
        config: the model's shape.
        rows: the parameters' rows, as `checkpoint.parameters` gives them.
        dtype: of the activations, the cache and, for now, the weights.
        task: one of bundle.TASKS.

    Returns:
        A complete model in standard operators and calls of the functions in the domain `phimoe`; its weights are
        `Parameter`s.
    """
    traced = capture(config, dtype, task)
    for function in FUNCTIONS:
        traced.functions[function.identifier()] = function
    traced.opset_imports[DOMAIN] = 1
    _name_inputs_and_outputs(traced.graph, *_contract(config, task))
    tied = {HEAD: EMBEDDING} if task == "text-generation" and config.tie_word_embeddings else {}
    rope = modeling.Rope(config)
    for name, value in traced.graph.initializers.items():
        if (parameter := tied.get(name, name)) in rows:  # a tied parameter is called after the head
            shape = value.shape.numpy()
            value.const_value = Parameter(name, value.dtype, shape, parts_of(parameter, shape, rows[parameter]))
        else:  # the rope's inverse frequencies
            value.const_value = ir.tensor(rope.get_buffer(name.removeprefix("model.rope.")).numpy(), name=name)
    return traced


def capture(config: PhiMoEConfig, dtype: ir.DataType, task: str) -> ir.Model:
    """What PyTorch's exporter makes of the task's model, a call of a function for each seam; its initializers have a
    shape and a dtype, and no numbers.
    """
    seams = modeling.Seams(_attention, _sparse_mixer, _experts)
    with FakeTensorMode(), _default_dtype(FLOATS[dtype]):
        model = modeling.MODELS[task](config, seams).eval()
        arguments, shapes = _cached(config) if task == "text-generation" else _whole()
        with warnings.catch_warnings(), _quiet_logging():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=OPSET)
    assert exported is not None
    return exported.model


def _cached(config: PhiMoEConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of new tokens after cached ones, and which of their dimensions are symbols."""
    batch, sequence, past = 2, 3, 5  # any sizes that differ: each becomes a symbol
    past_shape = (batch, config.num_key_value_heads, past, config.head_dim)
    arguments = (
        torch.zeros(batch, sequence, dtype=torch.int64),
        torch.ones(batch, past + sequence, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        [(torch.zeros(past_shape), torch.zeros(past_shape)) for _ in range(config.num_hidden_layers)],
    )
    dynamic = Dim.DYNAMIC
    cache = {0: dynamic, 2: dynamic}
    return arguments, (
        {0: dynamic, 1: dynamic},
        {0: dynamic, 1: dynamic},
        None,
        [(cache, cache)] * config.num_hidden_layers,
    )


def _whole() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of whole texts, and which of their dimensions are symbols."""
    shape = {0: Dim("batch"), 1: Dim("sequence")}
    return (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)), (shape, shape)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, _, head_dim = past_key.shape
    present = [batch, kv_heads, visible.shape[-1], head_dim]
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Attention",
        [query, key, value, cos, sin, past_key, past_value, visible],
        {"kv_heads": kv_heads, "head_dim": head_dim},
        dtypes=[query.dtype] * 3,
        shapes=[query.shape, present, present],
        version=1,
    )
    return output, present_key, present_value


def _sparse_mixer(scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    shape = [*scores.shape[:-1], 2]
    weights, chosen = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::SparseMixer",
        [scores],
        {"jitter": jitter},
        dtypes=[scores.dtype, torch.int64],
        shapes=[shape, shape],
        version=1,
    )
    return weights, chosen


def _experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Experts", [x, weights, chosen, gate_up_proj, down_proj], dtype=x.dtype, shape=x.shape, version=1
    )


def _name_inputs_and_outputs(graph: ir.Graph, inputs: Contract, outputs: Contract) -> None:
    for value, (name, shape) in zip((*graph.inputs, *graph.outputs), (*inputs.items(), *outputs.items()), strict=True):
        value.name = name
        value.shape = ir.Shape(shape)


def _contract(config: PhiMoEConfig, task: str) -> tuple[Contract, Contract]:
    """The inputs and the outputs that bundle.py names, in the model's order."""

    def cache(prefix: str, length: str) -> Contract:
        shape = ("batch", config.num_key_value_heads, length, config.head_dim)
        return dict.fromkeys(bundle.cache_names(config.num_hidden_layers, prefix), shape)

    ids: Contract = {bundle.INPUT_IDS: ("batch", "sequence")}
    if task == "text-generation":
        inputs = (
            ids
            | {bundle.ATTENTION_MASK: ("batch", "total"), bundle.ROPE_LENGTH: (1,)}
            | cache("past_key_values", "past")
        )
        return inputs, {bundle.LOGITS: ("batch", "kept", config.vocab_size)} | cache("present", "total")
    inputs = ids | {bundle.ATTENTION_MASK: ("batch", "sequence")}
    if task == "text-classification":
        return inputs, {bundle.LOGITS: ("batch", len(config.labels))}
    return inputs, {bundle.LAST_HIDDEN_STATE: ("batch", "sequence", config.hidden_size)}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes modules in `dtype`; `Module.to` cannot convert under a FakeTensorMode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keeps the exporter's notes about packages that are not installed off the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
