"""SparseMixer's choice and the experts -> one MoE or QMoE operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import MICROSOFT, Nodes, constant, expect, nodes, replace
from phimoe_onnx.exporter.passes.experts_stored import ExpertsWeights
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import Recipe


class FuseExperts(ir.passes.InPlacePass):
    """Replaces each `phimoe::Experts` that `StoreExperts` has been at by com.microsoft.MoE, or QMoE for blocks.

    1. The operators choose the two largest of `router_probs` and weigh them by a softmax that runs over those two.
       SparseMixer's weights p1 and p2 are not of that form, so the operator is given log(p1) and log(p2) at the chosen
       experts and -1e4 elsewhere, which it turns into p1 / (p1 + p2) and p2 / (p1 + p2), and its output is multiplied
       by p1 + p2. Exact for any jitter and number of experts, on every provider.
    2. Activations of 16 bits get the logarithms less the larger one: that becomes 0 and the other small, which
       rounding then hardly moves.

    All matrices of a layer are stored in one form (`Target.why_not_fused`). Matches exactly `num_hidden_layers` places.
    """

    def __init__(self, config: PhiMoEConfig, recipe: Recipe) -> None:
        super().__init__()
        self.config = config
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "Experts", DOMAIN)
        expect("the experts", len(matches), self.config.num_hidden_layers)
        for node in matches:
            self._fuse(model.graph, node)
        model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified=bool(matches))

    def _fuse(self, graph: ir.Graph, experts: ir.Node) -> None:
        x, weights = experts.inputs[:2]
        stored = ExpertsWeights.of(experts)
        new = Nodes(stored.prefix)
        probs = self._router_probs(graph, new, experts)
        total = new.add("ReduceSum", weights, constant(graph, "axis_last", [-1]), name="ReduceSum", keepdims=1)
        if x.dtype != ir.DataType.FLOAT:
            probs = new.add("Cast", probs, name="router_probs/Cast", to=x.dtype)
            total = new.add("Cast", total, name="ReduceSum/Cast", to=x.dtype)
        attributes: dict[str, int | float | str] = {
            "k": 2,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 0,
        }
        form = self.recipe.form(stored.gate_up[0].parameter)
        fc1, fc2 = (experts.inputs[3 : 3 + len(stored.gate_up)], experts.inputs[3 + len(stored.gate_up) :])
        if isinstance(form, Format):
            attributes |= {"expert_weight_bits": form.bits, "block_size": form.block_size, "accuracy_level": 4}
            if x.dtype != ir.DataType.FLOAT:  # CUDA then packs at load what is the CPU's layout here
                attributes["weights_prepacked"] = 0
            zeros = [] if form.symmetric else [None] * 4 + [fc1[2], fc2[2]]
            inputs = [*fc1[:2], None, *fc2[:2], *zeros]
            output = new.add("QMoE", x, probs, *inputs, name="QMoE", domain=MICROSOFT, **attributes)
        else:
            output = new.add("MoE", x, probs, *fc1, None, *fc2, name="MoE", domain=MICROSOFT, **attributes)
        replace(graph, [experts], new, [(experts.outputs[0], new.add("Mul", output, total, name="Mul"))])

    def _router_probs(self, graph: ir.Graph, new: Nodes, experts: ir.Node) -> ir.Value:
        """[T, E]: the logarithms of the chosen experts' weights, and -1e4 elsewhere."""
        x, weights, chosen = experts.inputs[:3]
        number = self.config.num_local_experts
        log_p = new.add("Log", weights, name="Log")
        if x.dtype != ir.DataType.FLOAT:
            both = new.several("Split", log_p, name="Split", outputs=("/first", "/second"), axis=-1, num_outputs=2)
            larger = new.add("Max", *both, name="Max")  # CUDA's ReduceMax needs cuDNN
            log_p = new.add("Sub", log_p, larger, name="Sub")
        leading = new.add("Shape", chosen, name="Shape", end=2)
        shape = new.add("Concat", leading, constant(graph, "experts", [number]), name="Concat", axis=0)
        nowhere = new.add("Expand", constant(graph, "not_chosen", -1e4, np.float32), shape, name="Expand")
        scattered = new.add("ScatterElements", nowhere, chosen, log_p, name="ScatterElements", axis=-1)
        by_token = constant(graph, "tokens_by_experts", [-1, number])
        return new.add("Reshape", scattered, by_token, name="router_probs")
