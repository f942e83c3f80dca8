"""The router, SparseMixer's choice and the experts -> one native operator."""

from __future__ import annotations

import onnx_ir as ir

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import NATIVE, Nodes, expect, nodes, parameter, replace
from phimoe_onnx.exporter.quantize.strips import Strips, superblock_size
from phimoe_onnx.exporter.recipe import ROUTER, Recipe


class NativeExperts(ir.passes.InPlacePass):
    """Replaces each `phimoe::Experts` that `StoreExperts` has been at, with the `phimoe::SparseMixer` and the router's
    MatMul before it, by phimoe.native.SparseMixerMoE(x, router, experts).

    Matches exactly `num_hidden_layers` places.
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
        model.opset_imports[NATIVE] = 1
        return ir.passes.PassResult(model, modified=bool(matches))

    def _fuse(self, graph: ir.Graph, experts: ir.Node) -> None:
        x, weights, _, stored = experts.inputs
        mixer = weights.producer()
        matmul = mixer.inputs[0].producer()
        transpose = matmul.inputs[1].producer()
        router = transpose.inputs[0]
        if parameter(router) is None or not router.name.endswith(ROUTER):
            raise ExportError(
                f"{experts.name}: expected the router before it; this is a bug of phimoe-onnx, please report it"
            )
        stem = stored.name.removesuffix("experts.strips")
        gate_up, down = (self.recipe.form(f"{stem}experts.{stack}") for stack in ("gate_up_proj", "down_proj"))
        assert isinstance(gate_up, Strips)
        assert isinstance(down, Strips)
        hidden_size, intermediate_size = self.config.hidden_size, self.config.intermediate_size
        new = Nodes(stem)
        output = new.add(
            "SparseMixerMoE",
            x,
            router,
            stored,
            name="SparseMixerMoE",
            domain=NATIVE,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=self.config.num_local_experts,
            gate_up_bits=gate_up.bits,
            down_bits=down.bits,
            gate_up_superblock_size=superblock_size(hidden_size),
            down_superblock_size=superblock_size(intermediate_size),
            router_jitter_noise=float(self.config.router_jitter_noise),
        )
        replace(graph, [transpose, matmul, mixer, experts], new, [(experts.outputs[0], output)])
