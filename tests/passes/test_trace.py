"""The traced graph is the model, and keeps the contract."""

from __future__ import annotations

import pytest

from phimoe_onnx import reference
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.weights import Parameter
from tests.checkpoints import SHAPES, assert_close, random_ids
from tests.passes.graphs import Checkpoint, Traced, count, run


@pytest.mark.parametrize("shape", SHAPES)
def test_the_traced_graph_is_the_model(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    counted = count(model)
    for seam in ("Attention", "SparseMixer", "Experts"):
        assert counted[f"{DOMAIN}::{seam}"] == config.num_hidden_layers
    assert counted["LayerNormalization"] == 2 * config.num_hidden_layers + 1
    exact = reference.load_reference(checkpoint(shape))
    assert_close(run(model, config)[0][0], reference.logits(exact, random_ids(45)))
    parameters = {name for name, value in model.graph.initializers.items() if isinstance(value.const_value, Parameter)}
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    assert parameters | tied == {name for name, _ in exact.named_parameters()} | tied


def test_the_traced_graph_keeps_the_contract(traced: Traced, checkpoint: Checkpoint) -> None:
    graph = traced("heads").graph
    shapes = {value.name: [str(dim) for dim in value.shape] for value in (*graph.inputs, *graph.outputs)}
    cache = {
        f"{prefix}.{layer}.{part}": ["batch", "1", length, "16"]
        for prefix, length in (("past_key_values", "past"), ("present", "total"))
        for layer in range(2)
        for part in ("key", "value")
    }
    assert shapes == cache | {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "rope_length": ["1"],
        "logits": ["batch", "kept", "2048"],
    }
