"""FuseAttention: the numbers stay, and attention is one operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import MICROSOFT
from phimoe_onnx.exporter.passes.attention import FuseAttention, rope_tables
from phimoe_onnx.modeling import Rope
from tests.checkpoints import SHAPES
from tests.passes.graphs import Checkpoint, Traced, change, check_same


@pytest.mark.parametrize("shape", SHAPES)
def test_fuse_attention(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    layers = config.num_hidden_layers
    changed = change(model, FuseAttention(config))
    assert changed[f"{MICROSOFT}::GroupQueryAttention"] == -changed[f"{DOMAIN}::Attention"] == layers
    assert changed["MatMul"] == changed["Transpose"] == -2 * layers  # three projections become one
    assert changed["Cos"] == changed["Sin"] == -1
    assert f"{DOMAIN}::Experts" not in changed
    assert f"{DOMAIN}::SparseMixer" not in changed
    assert "LayerNormalization" not in changed
    (fused, *others) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    attributes = {name: attribute.value for name, attribute in fused.attributes.items()}
    expected = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads, "do_rotary": 1}
    assert attributes == expected | ({"local_window_size": config.window} if config.window else {})
    assert all(node.inputs[5:] == fused.inputs[5:] for node in others)  # one set of lengths, tables and positions
    assert (len(fused.inputs) > 9 and fused.inputs[9] is not None) == (config.longrope is not None)
    check_same(model, traced(shape), config)


def test_fuse_attention_wants_every_layer(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.op_type = "Another"
    with pytest.raises(ExportError, match="the pass for attention matched 1 places, expected 2"):
        FuseAttention(config)(model)


def test_fuse_attention_wants_projections(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.replace_input_with(1, node.inputs[4])
    with pytest.raises(ExportError, match="expected a projection before attention"):
        FuseAttention(config)(model)


def test_the_rope_tables_are_the_models_rope(checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint("longrope"))
    cos, sin = (table.numpy() for table in rope_tables(config, ir.DataType.FLOAT))
    assert cos.shape == sin.shape == (32 + 128, 8)
    short = Rope(config)(torch.arange(32)[None], torch.tensor([[32]]))
    long = Rope(config)(torch.arange(128)[None], torch.tensor([[33]]))
    for table, part in ((cos, 0), (sin, 1)):
        # the last bit
        np.testing.assert_allclose(table, torch.cat((short[part][0], long[part][0])), rtol=3e-7, atol=1e-7)
    plain, _ = rope_tables(read_config(checkpoint("plain")), ir.DataType.FLOAT)
    assert plain.shape == (128, 8)


def test_a_step_that_the_operator_may_not_rotate(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("longrope"), read_config(checkpoint("longrope"))
    changed = change(model, FuseAttention(config, operator_rotates=False))
    assert changed[f"{MICROSOFT}::RotaryEmbedding"] == config.num_hidden_layers
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert {node.attributes["do_rotary"].as_int() for node in attention} == {0}
    check_same(model, traced("longrope"), config)
