"""The embedding table -> GatherBlockQuantized."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.exporter.passes._edit import MICROSOFT, expect, initializer, nodes, op, parameter, replace
from phimoe_onnx.exporter.quantize.rtn import Format


class QuantizeEmbedding(ir.passes.InPlacePass):
    """Replaces Gather(embed_tokens, input_ids) by com.microsoft.GatherBlockQuantized. Matches exactly one place."""

    def __init__(self, format: Format) -> None:
        super().__init__()
        self.format = format

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = [node for node in nodes(model, "Gather") if parameter(node.inputs[0]) is not None]
        expect("the embedding", len(matches), 1)
        (gather,) = matches
        weight = parameter(gather.inputs[0])
        assert weight is not None
        name = "model.embed_tokens"  # a tied parameter is called after the head
        codes, scales = (initializer(model.graph, w) for w in self.format.codes_and_scales(weight, name))
        attributes: dict[str, int | float | str] = {
            "bits": self.format.bits,
            "block_size": self.format.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        new = op(
            "GatherBlockQuantized",
            [codes, gather.inputs[1], scales],
            f"{name}/GatherBlockQuantized",
            attributes,
            MICROSOFT,
        )
        replace(model.graph, [gather], [new], [(gather.outputs[0], new.outputs[0])])
        model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified=True)
