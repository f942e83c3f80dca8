"""The experts' matrices in the form that the recipe gives them, before a target's way to compute them is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import by_block, expect, initializer, nodes, parameter
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.recipe import Recipe
from phimoe_onnx.exporter.weights import (
    FLOATS,
    Parameter,
    Part,
    Piece,
    Weight,
    block_weights,
    experts_in_strips,
    in_columns,
    interleaved,
    job_piece,
    narrowed,
    rounding_job,
)


class StoreExperts(ir.passes.InPlacePass):
    """Gives each `phimoe::Experts` its weights as they are stored, in the place of gate_up_proj and down_proj.

    1. gate_up_proj becomes fc1, in which row 2i is the gate's row i and row 2i + 1 is row i of up, as the fused
       SwiGLU of MoE and QMoE wants it; down_proj is fc2. Branches read the same bytes.
    2. Each is a stack [E, N, K] as one weight, or as codes, scales and zeros; where the experts of a stack are stored
       in different forms, it is those of every expert by itself.
    3. Standard operators read every expert's by itself, transposed.
    4. For native operators both become one weight, an expert after the other (strips.py).

    So every graph that is made of this one has its weights in common. Matches exactly `num_hidden_layers` places.
    """

    def __init__(self, layers: int, recipe: Recipe) -> None:
        super().__init__()
        self.layers = layers
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = nodes(model, "Experts", DOMAIN)
        expect("the experts", len(matches), self.layers)
        for node in matches:
            gate_up, down = (parameter(value) for value in node.inputs[3:])
            if gate_up is None or down is None:
                raise ExportError(
                    f"{node.name}: its weights are no parameters; this is a bug of phimoe-onnx, please report it"
                )
            prefix = gate_up.name.removesuffix("gate_up_proj")
            if self.recipe.operators == "native":
                stored = [experts_in_strips(prefix.removesuffix("."), gate_up, down, self.recipe)]
            else:
                stored = [*self._store(gate_up, f"{prefix}fc1"), *self._store(down, f"{prefix}fc2")]
            node.resize_inputs(3 + len(stored))
            for index, weight in enumerate(stored, 3):
                node.replace_input_with(index, initializer(model.graph, weight))
        return ir.passes.PassResult(model, modified=bool(matches))

    def _store(self, weight: Parameter, name: str) -> list[Weight]:
        """The stack in its stored form."""
        number = int(weight.shape[0])
        each = len(weight.parts) // number
        experts = [weight.parts[e * each : (e + 1) * each] for e in range(number)]
        if not self.recipe.alike(weight.parameter):
            return [matrix for parts in experts for matrix in self._store_one(weight, parts, name)]
        form = self.recipe.form(weight.parameter)
        if isinstance(form, Format):
            if self.recipe.target.blocks == "DequantizeLinear":
                return [each for parts in experts for each in in_columns(name, parts, form, self.recipe)]
            jobs = [rounding_job(parts, form, self.recipe, interleaved) for parts in experts]
            return block_weights(name, jobs, weight.shape.numpy(), form, weight.parameter)
        if each == 1:
            return [weight]
        pieces = [_plain(parts, weight.dtype) for parts in experts]
        return [Weight(f"{name}.weight", weight.dtype, weight.shape.numpy(), pieces, weight.parameter)]

    def _store_one(self, weight: Parameter, parts: Sequence[Part], name: str) -> list[Weight]:
        """One expert's matrix in its stored form."""
        expert, shape = parts[0].expert, weight.shape.numpy()[1:]
        form = self.recipe.form(weight.parameter, expert)
        if isinstance(form, Format):
            if self.recipe.target.blocks == "DequantizeLinear":
                return list(in_columns(name, parts, form, self.recipe))
            job = rounding_job(parts, form, self.recipe, interleaved)
            codes, *others = block_weights(name, [job], shape, form, weight.parameter, expert)
            return [by_block(codes, form), *others]
        piece = _plain(parts, weight.dtype)
        return [Weight(f"{name}.weight.{expert}", weight.dtype, shape, [piece], weight.parameter, expert)]


def _plain(parts: Sequence[Part], dtype: ir.DataType) -> Piece:
    shape = (sum(part.rows.shape[0] for part in parts), parts[0].rows.shape[1])
    run = partial(_read, parts, FLOATS[dtype])
    return job_piece(run, shape, dtype, parts[0].layer)


def _read(parts: Sequence[Part], dtype: torch.dtype) -> torch.Tensor:
    return interleaved([narrowed(part.rows.read(), dtype, part.parameter, part.expert) for part in parts])


@dataclass(frozen=True)
class ExpertsWeights:
    """The stored weights of a `phimoe::Experts`."""

    gate_up: tuple[Weight, ...]
    down: tuple[Weight, ...]

    @classmethod
    def of(cls, experts: ir.Node) -> ExpertsWeights:
        """Reads them from its inputs."""
        stored = [value.const_value for value in experts.inputs[3:]]
        gate_up = tuple(weight for weight in stored if weight.parameter.endswith("gate_up_proj"))
        return cls(gate_up, tuple(stored[len(gate_up) :]))

    @property
    def prefix(self) -> str:
        """What the names of the module's values begin with."""
        return self.gate_up[0].parameter.removesuffix("experts.gate_up_proj")
