"""SparseMixer's choice and the experts -> one MoE or QMoE operator."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from phimoe_onnx.checkpoint.tensors import Rows
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import MICROSOFT, constant, expect, initializer, nodes, op, parameter, replace
from phimoe_onnx.exporter.quantize.rtn import Format
from phimoe_onnx.exporter.weights import FLOATS, Job, Parameter, Weight, job_piece


class FuseExperts(ir.passes.InPlacePass):
    """Replaces each `phimoe::Experts` by com.microsoft.MoE, or by QMoE where `format` is given.

    The operators choose the two largest of `router_probs` and weigh them by a softmax that runs over those two.
    SparseMixer's weights p1 and p2 are not of that form, so the operator is given log(p1) and log(p2) at the chosen
    experts and -1e4 elsewhere, which it turns into p1 / (p1 + p2) and p2 / (p1 + p2), and its output is multiplied by
    p1 + p2. Exact for any jitter and number of experts, on every provider.

    The operators' fused SwiGLU wants row 2i of fc1 to be the gate's row i and row 2i + 1 to be row i of up.

    Matches exactly `layers` places.
    """

    def __init__(self, layers: int, format: Format | None) -> None:
        super().__init__()
        self.layers = layers
        self.format = format

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "Experts", DOMAIN)
        expect("the experts", len(matches), self.layers)
        for node in matches:
            self._fuse(model.graph, node)
        model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified=True)

    def _fuse(self, graph: ir.Graph, experts: ir.Node) -> None:
        x, weights, chosen, gate_up_value, down_value = experts.inputs
        gate_up, down = parameter(gate_up_value), parameter(down_value)
        if gate_up is None or down is None:
            raise ExportError(
                f"{experts.name}: its weights are no parameters; this is a bug of phimoe-onnx, please report it"
            )
        name = gate_up.name.removesuffix("experts.gate_up_proj")
        new: list[ir.Node] = []

        def add(op_type: str, *inputs: ir.Value, suffix: str, **attributes: int) -> ir.Value:
            new.append(op(op_type, inputs, name + suffix, dict(attributes)))
            return new[-1].outputs[0]

        last = constant(graph, "axis_last", [-1])
        number = int(gate_up.shape[0])
        log_p = add("Log", weights, suffix="Log")
        if x.dtype != ir.DataType.FLOAT:  # the larger becomes 0 and the other small, which rounding then hardly moves
            new.append(
                op("Split", [log_p], name + "Split", {"axis": -1, "num_outputs": 2}, outputs=("/first", "/second"))
            )
            log_p = add(
                "Sub", log_p, add("Max", *new[-1].outputs, suffix="Max"), suffix="Sub"
            )  # CUDA's ReduceMax needs cuDNN
        shape = add(
            "Concat",
            add("Shape", chosen, suffix="Shape", end=2),
            constant(graph, "experts", [number]),
            suffix="Concat",
            axis=0,
        )
        nowhere = add("Expand", constant(graph, "not_chosen", -1e4, np.float32), shape, suffix="Expand")
        scattered = add("ScatterElements", nowhere, chosen, log_p, suffix="ScatterElements", axis=-1)
        probs = add("Reshape", scattered, constant(graph, "tokens_by_experts", [-1, number]), suffix="router_probs")
        total = add("ReduceSum", weights, last, suffix="ReduceSum", keepdims=1)
        if x.dtype != ir.DataType.FLOAT:
            probs = add("Cast", probs, suffix="router_probs/Cast", to=x.dtype)
            total = add("Cast", total, suffix="ReduceSum/Cast", to=x.dtype)

        attributes: dict[str, int | float | str] = {
            "k": 2,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 0,
        }
        if self.format is None:
            fc1 = _interleaved(gate_up, f"{name}experts.fc1.weight")
            inputs = [x, probs, initializer(graph, fc1), None, down_value]
            new.append(op("MoE", inputs, f"{name}MoE", attributes, MICROSOFT))
        else:
            attributes |= {
                "expert_weight_bits": self.format.bits,
                "block_size": self.format.block_size,
                "accuracy_level": 4,
            }
            if x.dtype != ir.DataType.FLOAT:  # CUDA then packs at load what is the CPU's layout here
                attributes["weights_prepacked"] = 0
            fc1_and_scales = _interleaved_codes(gate_up, f"{name}experts.fc1", self.format)
            fc2_and_scales = self.format.codes_and_scales(down, f"{name}experts.fc2")
            fc1, fc1_scales, fc2, fc2_scales = (initializer(graph, w) for w in (*fc1_and_scales, *fc2_and_scales))
            new.append(
                op("QMoE", [x, probs, fc1, fc1_scales, None, fc2, fc2_scales], f"{name}QMoE", attributes, MICROSOFT)
            )
        output = add("Mul", new[-1].outputs[0], total, suffix="Mul")
        replace(graph, [experts], new, [(experts.outputs[0], output)])


def _pairs(gate_up: Parameter) -> list[tuple[Rows, Rows]]:
    """Each expert's gate and up, [I, H] each."""
    return list(zip(gate_up.rows[::2], gate_up.rows[1::2], strict=True))


def _interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def _read_interleaved(gate: Rows, up: Rows, dtype: torch.dtype) -> torch.Tensor:
    return _interleave(gate.read(), up.read()).to(dtype)


def _interleaved(gate_up: Parameter, name: str) -> Weight:
    """fc1 [E, 2 * I, H] in the parameter's own dtype, a job an expert."""
    dtype = FLOATS[gate_up.dtype]
    pieces = []
    for gate, up in _pairs(gate_up):
        shape = (2 * gate.shape[0], gate.shape[1])
        pieces.append(job_piece(partial(_read_interleaved, gate, up, dtype), shape, gate_up.dtype))
    return Weight(name, gate_up.dtype, gate_up.shape.numpy(), pieces)


def _interleaved_codes(gate_up: Parameter, name: str, format: Format) -> tuple[Weight, Weight]:
    """fc1's codes and scales, a job an expert."""

    def job(gate: Rows, up: Rows) -> Job:
        def run() -> tuple[torch.Tensor, ...]:
            parts = zip(format.quantize(gate.read()), format.quantize(up.read()), strict=True)
            return tuple(_interleave(g, u) for g, u in parts)

        return Job(run, format.nbytes(2 * gate.shape[0], gate.shape[1]))

    return format.weights(name, [job(gate, up) for gate, up in _pairs(gate_up)], gate_up.shape.numpy())
