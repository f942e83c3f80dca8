"""StoreProjections: the numbers stay, or are those of the rounded weights."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.passes._edit import MICROSOFT
from phimoe_onnx.exporter.passes.projections import StoreProjections
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.rtn import round_to_nearest
from tests.passes.graphs import Checkpoint, Traced, change, check_same, level_0, recipe

INT4, INT8 = Format(4, 32), Format(8, 32)
LAYERS = 2


@pytest.mark.parametrize("shape", ["plain", "no-bias", "tied"])
def test_store_projections_as_they_are_used(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    assert change(model, StoreProjections(recipe(config))) == {"Transpose": -(5 * LAYERS + 1)}
    weight = model.graph.initializers["lm_head.weight.transposed"].const_value
    assert weight.shape == (64, 2048)
    check_same(model, traced(shape), config)


@pytest.mark.parametrize("shape", ["plain", "no-bias", "head_dim"])
def test_store_projections_quantized(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    """The named ones only, each with its bias; against the graph whose weights are dequantised."""
    model, config = traced(shape), read_config(checkpoint(shape))
    biases = (LAYERS if config.attention_bias else 0) + (1 if config.lm_head_bias else 0)
    changed = change(model, StoreProjections(recipe(config, o_proj__weight="int8", lm_head__weight="int4")))
    added = changed.pop("Add", 0)
    assert added == -biases
    assert changed == {f"{MICROSOFT}::MatMulNBits": LAYERS + 1, "MatMul": -(LAYERS + 1), "Transpose": -(5 * LAYERS + 1)}
    nodes = {node.name: node for node in model.graph if node.op_type == "MatMulNBits"}
    head = nodes["lm_head/MatMulNBits"]
    attributes = {name: attribute.value for name, attribute in head.attributes.items()}
    assert attributes == {"N": 2048, "K": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}
    assert tuple(head.inputs[1].shape.numpy()) == (2048, 2, 16)
    assert (len(head.inputs) > 5) == config.lm_head_bias
    level_0(model)
    dequantized = traced(shape)
    for name, value in dequantized.graph.initializers.items():
        format = INT8 if name.endswith("o_proj.weight") else INT4 if name == "lm_head.weight" else None
        if format:
            weight = torch.from_numpy(value.const_value.numpy().copy())
            value.const_value = ir.tensor(
                format.dequantize(*round_to_nearest(weight, format, name, None)).numpy(), name=name
            )
    check_same(model, dequantized, config)
