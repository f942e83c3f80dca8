"""Names that say where a node comes from."""

from __future__ import annotations

import ast

import onnx_ir as ir

# metadata of a traced node, and of what was inlined for one: its modules, outermost first
SCOPES = "pkg.torch.onnx.name_scopes"


class NameNodes(ir.passes.InPlacePass):
    """Names traced nodes, which carry their scope; nodes that a pass made are named by that pass.

    1. A node is called after its module and operator, `model.layers.0.self_attn/Softmax`, the next such one `..._2`.
    2. Its outputs are called likewise, with `.0`, `.1` where there are several; the graph's own keep their names.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        traced = [node for node in nodes if SCOPES in node.metadata_props]
        taken = {node.name for node in nodes if SCOPES not in node.metadata_props}
        for node in traced:
            *_, module, _ = ast.literal_eval(node.metadata_props[SCOPES])
            # the outermost has no name
            plain = f"{module if module and not module.startswith('_') else 'model'}/{node.op_type}"
            name, count = plain, 1
            while name in taken:
                count += 1
                name = f"{plain}_{count}"
            taken.add(name)
            node.name = name
            for index, value in enumerate(node.outputs):
                if not value.is_graph_output():
                    value.name = name if len(node.outputs) == 1 else f"{name}.{index}"
        return ir.passes.PassResult(model, modified=bool(traced))
