"""ReshapeCache: the numbers stay, and every past is reshaped."""

from __future__ import annotations

import pytest

from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.passes.cache import ReshapeCache
from tests.checkpoints import SHAPES
from tests.passes.graphs import Checkpoint, Traced, change, check_same


@pytest.mark.parametrize("shape", SHAPES)
def test_reshape_cache(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    changed = change(model, ReshapeCache(config))
    assert changed == {"Shape": 3, "Sub": 1, "Concat": 1, "Reshape": 2 * config.num_hidden_layers}
    for value in model.graph.inputs:
        if value.name.startswith("past_key_values"):
            assert [str(dim) for dim in value.shape] == ["batch", "past_heads", "past", "past_head_dim"]
            assert [use.node.op_type for use in value.uses()] == ["Reshape"]
    check_same(model, traced(shape), config)
