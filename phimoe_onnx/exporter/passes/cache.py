"""Cache inputs that take an empty cache of any width, as callers make it who know less than config.json says."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx import bundle
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.passes._edit import Nodes, constant


class ReshapeCache(ir.passes.InPlacePass):
    """Takes an empty cache of any width.

    1. A Reshape to [B, K, P, D] stands behind every `past_key_values` input.
    2. The inputs' heads and head_dim become symbols.

    optimum's ORTModelForCausalLM begins with an empty cache of num_attention_heads heads of hidden_size /
    num_attention_heads. A cache that holds something keeps its shape, and ONNX Runtime passes it on without a copy;
    another width is an error there.

    Takes a graph whose cache grows (the portable target's); GroupQueryAttention wants its buffers as they are.
    """

    def __init__(self, config: PhiMoEConfig) -> None:
        super().__init__()
        self.config = config

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, config = model.graph, self.config
        named = {value.name: value for value in graph.inputs}
        new = Nodes()
        add = new.add
        batch = add("Shape", named[bundle.INPUT_IDS], name="past_shape/batch", start=0, end=1)
        sequence = add("Shape", named[bundle.INPUT_IDS], name="past_shape/sequence", start=1)
        total = add("Shape", named[bundle.ATTENTION_MASK], name="past_shape/total", start=1)
        length = add("Sub", total, sequence, name="past_shape/past")
        heads = constant(graph, "num_key_value_heads", [config.num_key_value_heads])
        head_dim = constant(graph, "head_dim", [config.head_dim])
        shape = add("Concat", batch, heads, length, head_dim, name="past_shape", axis=0)
        for name in bundle.cache_names(config.num_hidden_layers, "past_key_values"):
            past = named[name]
            reshaped = add("Reshape", past, shape, name=f"{name}/Reshape", allowzero=1)
            reshaped.type, reshaped.shape = past.type, past.shape
            ir.convenience.replace_all_uses_with(past, reshaped)
            new[-1].replace_input_with(0, past)
            past.shape = ir.Shape(["batch", "past_heads", "past", "past_head_dim"])
        graph.insert_before(graph[0], new)
        return ir.passes.PassResult(model, modified=True)
