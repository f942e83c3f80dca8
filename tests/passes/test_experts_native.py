"""NativeExperts and the native projections: what they match, what they write, and what is refused."""

from __future__ import annotations

import pytest

from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes._edit import NATIVE
from phimoe_onnx.exporter.passes.experts_native import NativeExperts
from phimoe_onnx.exporter.passes.experts_stored import StoreExperts
from phimoe_onnx.exporter.passes.projections import StoreProjections
from phimoe_onnx.exporter.quantize.strips import Strips, expert_bytes
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import TARGETS
from tests.passes.graphs import Checkpoint, Traced, change


@pytest.mark.parametrize("shape", ["plain", "experts"])
def test_a_layer_is_one_operator(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    layers, e, h, i = (
        config.num_hidden_layers,
        config.num_local_experts,
        config.hidden_size,
        config.intermediate_size,
    )
    recipe = recipe_for(config, TARGETS["cpu"], "int4", store={"*down_proj": "int8"}, operators="native")
    StoreExperts(layers, recipe)(model)
    StoreProjections(recipe)(model)
    changed = change(model, NativeExperts(config, recipe))
    assert changed == {
        f"{NATIVE}::SparseMixerMoE": layers,
        f"{DOMAIN}::Experts": -layers,
        f"{DOMAIN}::SparseMixer": -layers,
        "MatMul": -layers,
        "Transpose": -layers,
    }
    for node in model.graph:
        if node.op_type != "SparseMixerMoE":
            continue
        x, router, experts = node.inputs
        assert x.shape is not None
        assert tuple(router.shape.numpy()) == (e, h)
        assert tuple(experts.shape.numpy()) == (e, expert_bytes(Strips(4), Strips(8), h, i))
        values = {name: attribute.value for name, attribute in node.attributes.items()}
        assert values.pop("router_jitter_noise") == pytest.approx(config.router_jitter_noise)
        assert values == {
            "hidden_size": h,
            "intermediate_size": i,
            "num_experts": e,
            "gate_up_bits": 4,
            "down_bits": 8,
            "gate_up_superblock_size": 64 * -(-h // 64),
            "down_superblock_size": 64 * -(-i // 64),
        }


@pytest.mark.parametrize(("shape", "biased"), [("plain", True), ("no-bias", False)])
def test_projections_take_their_bias_with_them(
    traced: Traced, checkpoint: Checkpoint, shape: str, biased: bool
) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    recipe = recipe_for(config, TARGETS["cpu"], "int4", operators="native")
    changed = change(model, StoreProjections(recipe))
    projections = 4 * config.num_hidden_layers + 1
    assert changed.pop(f"{NATIVE}::Projection") == -changed.pop("MatMul") == -changed.pop("Transpose") == projections
    assert changed == ({"Add": -projections} if biased else {})
    for node in model.graph:
        if node.op_type == "Projection":
            assert (len(node.inputs) == 3) is biased
            n, k = (node.attributes[name].as_int() for name in ("out_features", "in_features"))
            strips = node.inputs[1]
            assert tuple(strips.shape.numpy()) == (-(-n // 16), Strips(4).strip_bytes(k))


def test_weights_in_floats_stay_a_matmul(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    recipe = recipe_for(config, TARGETS["cpu"], "int4", store={"lm_head.weight": "none"}, operators="native")
    changed = change(model, StoreProjections(recipe))
    assert changed[f"{NATIVE}::Projection"] == 4 * config.num_hidden_layers
    assert sum(node.op_type == "MatMul" for node in model.graph) == config.num_hidden_layers + 1  # routers and the head


def test_other_graphs_are_refused(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    recipe = recipe_for(config, TARGETS["cpu"], "int4", operators="native")
    StoreExperts(config.num_hidden_layers, recipe)(model)
    StoreProjections(recipe)(model)
    NativeExperts(config, recipe)(model)
    with pytest.raises(ExportError, match="the experts matched 0 places"):
        NativeExperts(config, recipe).call(model)
