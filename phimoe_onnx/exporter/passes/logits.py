"""The optional inputs, how many last positions get logits and the rope length; and a form in which they are plain
inputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from phimoe_onnx import bundle
from phimoe_onnx.exporter.passes._edit import Nodes, constant, nodes


class AddOptionalInputs(ir.passes.InPlacePass):
    """Gives the graph the inputs that a plain caller need not know.

    1. `logits_to_keep` int64 [1]: Slice of the last positions [B, S, H] -> [B, kept, H] before the language-model head,
       so that a prefill does not pay for logits that it throws away. The default 0 keeps all.
    2. `rope_length`, an input already, gets the default 0; without longrope nothing reads it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        zero = np.zeros(1, np.int64)
        *_, head = nodes(model, "MatMul")  # the last projection
        keep = ir.Value(name=bundle.LOGITS_TO_KEEP, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        keep.const_value = ir.tensor(zero, name=keep.name)
        graph.inputs.append(keep)
        graph.initializers.add(keep)
        hidden = head.inputs[0]
        # `keep` again, by a way that leads through the host's memory only, where Slice reads: no copy from a GPU
        new = Nodes("logits_to_keep/")
        length = new.add("Shape", new.add("ConstantOfShape", keep, name="ConstantOfShape"), name="Shape")
        start = new.add("Neg", length, name="Neg")
        end = constant(graph, "int64_max", [np.iinfo(np.int64).max])
        kept = new.add("Slice", hidden, start, end, constant(graph, "axis_1", [1]), name="Slice")
        graph.insert_before(head, new)
        head.replace_input_with(0, kept)
        kept.type = hidden.type

        rope_length = next(value for value in graph.inputs if value.name == bundle.ROPE_LENGTH)
        rope_length.const_value = ir.tensor(zero, name=rope_length.name)
        graph.initializers.add(rope_length)
        return ir.passes.PassResult(model, modified=True)


class RequireInputs(ir.passes.InPlacePass):
    """Takes the default values of `OPTIONAL_INPUTS` away, so that they are inputs like any other.

    ONNX Runtime's releases for Java, Node and browsers take no values for inputs with a default: Java refuses them, the
    others ignore them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name in bundle.OPTIONAL_INPUTS:
            model.graph.initializers.pop(name).const_value = None
        return ir.passes.PassResult(model, modified=True)
