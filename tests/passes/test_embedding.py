"""QuantizeEmbedding: the numbers are those of the rounded table."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.passes._edit import MICROSOFT
from phimoe_onnx.exporter.passes.embedding import QuantizeEmbedding
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.rtn import round_to_nearest
from phimoe_onnx.exporter.weights import Weight
from tests.passes.graphs import Checkpoint, Traced, change, check_same, recipe


@pytest.mark.parametrize("shape", ["plain", "tied"])
def test_quantize_embedding(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    format = Format(8, 32)
    quantize = QuantizeEmbedding(recipe(config, embed_tokens__weight="int8"))
    assert change(model, quantize) == {f"{MICROSOFT}::GatherBlockQuantized": 1, "Gather": -1}
    dequantized = traced(shape)
    gather = next(
        node
        for node in dequantized.graph
        if node.op_type == "Gather" and isinstance(node.inputs[0].const_value, Weight)
    )
    table = torch.from_numpy(gather.inputs[0].const_value.numpy().copy())
    rounded = ir.tensor(format.dequantize(*round_to_nearest(table, format, "", None)).numpy(), name="rounded")
    value = ir.Value(name="rounded", type=gather.inputs[0].type, shape=gather.inputs[0].shape, const_value=rounded)
    dequantized.graph.register_initializer(value)
    gather.replace_input_with(0, value)  # a tied head keeps the exact table
    check_same(model, dequantized, config)
    with pytest.raises(ExportError, match="the embedding matched 0 places, expected 1"):
        quantize(model)


def test_a_plain_table_stays(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    assert change(model, QuantizeEmbedding(recipe(config))) == {}
