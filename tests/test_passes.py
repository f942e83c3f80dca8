"""Each graph pass alone, on the traced graph of a small model: the numbers stay, the operators change as it says."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import common

from phimoe_onnx import reference
from phimoe_onnx.checkpoint import tensors as checkpoints
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.functions import DOMAIN
from phimoe_onnx.exporter.passes import attention
from phimoe_onnx.exporter.passes._edit import MICROSOFT
from phimoe_onnx.exporter.passes.attention import FuseAttention, rope_tables
from phimoe_onnx.exporter.passes.branches import BranchExperts
from phimoe_onnx.exporter.passes.cache import ReshapeCache
from phimoe_onnx.exporter.passes.embedding import QuantizeEmbedding
from phimoe_onnx.exporter.passes.half import StoreHalf
from phimoe_onnx.exporter.passes.logits import AddOptionalInputs
from phimoe_onnx.exporter.passes.moe import FuseExperts
from phimoe_onnx.exporter.passes.names import NameNodes
from phimoe_onnx.exporter.passes.norms import FuseSkipLayerNorm
from phimoe_onnx.exporter.passes.projections import StoreProjections
from phimoe_onnx.exporter.quantize.rtn import Format
from phimoe_onnx.exporter.staging import Journal
from phimoe_onnx.exporter.trace import trace
from phimoe_onnx.exporter.weights import Parameter, Weight
from phimoe_onnx.exporter.write import Layout, write_weights
from phimoe_onnx.modeling import Rope
from tests.checkpoints import SHAPES, assert_close, feeds, open_graph, random_ids

Traced = Callable[[str], ir.Model]
Checkpoint = Callable[[str], Path]
INT4, INT8 = Format(4, 32), Format(8, 32)
LAYERS = 2


@pytest.fixture(scope="module")
def traced(checkpoint: Checkpoint) -> Traced:
    """traced(shape) -> a fresh copy of the traced graph."""
    models: dict[str, ir.Model] = {}

    def copy(shape: str) -> ir.Model:
        if shape not in models:
            folder = checkpoint(shape)
            config = read_config(folder)
            models[shape] = trace(
                config, checkpoints.parameters(config, checkpoints.read_headers(folder)), ir.DataType.FLOAT
            )
        return models[shape].clone()

    return copy


def run(
    model: ir.Model, config: PhiMoEConfig, length: int = 45, rope_length: bool = True, **optional: int
) -> list[Any]:
    """Logits and presents of one row, computed by ONNX Runtime from a copy of the graph with its functions inlined."""
    model = model.clone()
    common.InlinePass()(model)
    common.RemoveUnusedNodesPass()(model)
    folder = Path(tempfile.mkdtemp())
    try:
        layout = Layout()
        layout.save(model, folder / "model.onnx")
        journal = Journal(folder, "plan")
        write_weights(layout, folder, journal, lambda nbytes: None)
        journal.close()
        inputs = feeds(config, [random_ids(length)], **({"rope_length": 0} if rope_length else {}), **optional)
        outputs: list[Any] = open_graph(folder / "model.onnx").run(None, inputs)
    finally:
        shutil.rmtree(folder)
    return outputs


def count(model: ir.Model) -> Counter[str]:
    """How often each operator stands in the main graph; other domains' are named domain::operator."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)


def change(model: ir.Model, how: ir.passes.InPlacePass) -> dict[str, int]:
    """Applies a pass; returns by how much the count of each operator changed, dead nodes left out before and after."""
    common.RemoveUnusedNodesPass()(model)
    before = count(model)
    assert how(model).modified
    common.RemoveUnusedNodesPass()(model)
    after = count(model)
    return {name: after[name] - before[name] for name in before | after if after[name] != before[name]}


def check_same(model: ir.Model, original: ir.Model, config: PhiMoEConfig) -> None:
    for got, expected in zip(run(model, config), run(original, config), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_traced_graph_is_the_model(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    counted = count(model)
    for seam in ("Attention", "SparseMixer", "Experts"):
        assert counted[f"{DOMAIN}::{seam}"] == config.num_hidden_layers
    assert counted["LayerNormalization"] == 2 * config.num_hidden_layers + 1
    exact = reference.load_reference(checkpoint(shape))
    assert_close(run(model, config)[0][0], reference.logits(exact, random_ids(45)))
    parameters = {name for name, value in model.graph.initializers.items() if isinstance(value.const_value, Parameter)}
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    assert parameters | tied == {name for name, _ in exact.named_parameters()} | tied


def test_the_traced_graph_keeps_the_contract(traced: Traced, checkpoint: Checkpoint) -> None:
    graph = traced("heads").graph
    shapes = {value.name: [str(dim) for dim in value.shape] for value in (*graph.inputs, *graph.outputs)}
    cache = {
        f"{prefix}.{layer}.{part}": ["batch", "1", length, "16"]
        for prefix, length in (("past_key_values", "past"), ("present", "total"))
        for layer in range(2)
        for part in ("key", "value")
    }
    assert shapes == cache | {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "rope_length": ["1"],
        "logits": ["batch", "kept", "2048"],
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_reshape_cache(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    changed = change(model, ReshapeCache(config))
    assert changed == {"Shape": 3, "Sub": 1, "Concat": 1, "Reshape": 2 * config.num_hidden_layers}
    for value in model.graph.inputs:
        if value.name.startswith("past_key_values"):
            assert [str(dim) for dim in value.shape] == ["batch", "past_heads", "past", "past_head_dim"]
            assert [use.node.op_type for use in value.uses()] == ["Reshape"]
    check_same(model, traced(shape), config)


def test_name_nodes(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    common.InlinePass()(model)
    NameNodes()(model)
    names = [node.name for node in ir.traversal.RecursiveGraphIterator(model.graph)]
    assert len(set(names)) == len(names)
    moe = "model.layers.1.block_sparse_moe"
    assert {"model/CumSum", "model.layers.0/Add", "model.layers.0/Add_2", f"{moe}/TopK", "lm_head/MatMul"} < set(names)
    values = {value.name: node.name for node in model.graph for value in node.outputs}
    assert (values[f"{moe}/TopK.0"], values[f"{moe}/TopK.1"]) == (f"{moe}/TopK", f"{moe}/TopK")
    assert (values["lm_head/MatMul"], values["logits"]) == ("lm_head/MatMul", "lm_head/Add")
    check_same(model, traced("plain"), config)


@pytest.mark.parametrize("shape", SHAPES)
def test_fuse_attention(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    layers = config.num_hidden_layers
    changed = change(model, FuseAttention(config, "cpu"))
    assert changed[f"{MICROSOFT}::GroupQueryAttention"] == -changed[f"{DOMAIN}::Attention"] == layers
    assert changed["MatMul"] == changed["Transpose"] == -2 * layers  # three projections become one
    assert changed["Cos"] == changed["Sin"] == -1
    assert f"{DOMAIN}::Experts" not in changed
    assert f"{DOMAIN}::SparseMixer" not in changed
    assert "LayerNormalization" not in changed
    (fused, *others) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    attributes = {name: attribute.value for name, attribute in fused.attributes.items()}
    expected = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads, "do_rotary": 1}
    assert attributes == expected | ({"local_window_size": config.window} if config.window else {})
    assert all(node.inputs[5:] == fused.inputs[5:] for node in others)  # one set of lengths, tables and positions
    assert (len(fused.inputs) > 9 and fused.inputs[9] is not None) == (config.longrope is not None)
    check_same(model, traced(shape), config)


def test_fuse_attention_wants_every_layer(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.op_type = "Another"
    with pytest.raises(ExportError, match="the pass for attention matched 1 places, expected 2"):
        FuseAttention(config, "cpu")(model)


def test_fuse_attention_wants_projections(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("plain"), read_config(checkpoint("plain"))
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.replace_input_with(1, node.inputs[4])
    with pytest.raises(ExportError, match="expected a projection before attention"):
        FuseAttention(config, "cpu")(model)


def test_the_rope_tables_are_the_models_rope(checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint("longrope"))
    cos, sin = (table.numpy() for table in rope_tables(config, ir.DataType.FLOAT))
    assert cos.shape == sin.shape == (32 + 128, 8)
    short = Rope(config)(torch.arange(32)[None], torch.tensor([[32]]))
    long = Rope(config)(torch.arange(128)[None], torch.tensor([[33]]))
    for table, part in ((cos, 0), (sin, 1)):
        np.testing.assert_allclose(
            table, torch.cat((short[part][0], long[part][0])), rtol=3e-7, atol=1e-7
        )  # the last bit
    plain, _ = rope_tables(read_config(checkpoint("plain")), ir.DataType.FLOAT)
    assert plain.shape == (128, 8)


@pytest.mark.parametrize(("head_dim", "fits"), [(8, False), (16, True), (24, False), (32, True), (96, True)])
def test_head_dims_that_group_query_attention_takes(checkpoint: Checkpoint, head_dim: int, fits: bool) -> None:
    config = dataclasses.replace(read_config(checkpoint("plain")), head_dim=head_dim)
    if fits:
        attention.check(config)
    else:
        with pytest.raises(ExportError, match=rf"head_dim is {head_dim}.*--target portable"):
            attention.check(config)


@pytest.mark.parametrize("shape", ["plain", "no-bias", "experts"])
def test_fuse_skip_layer_norm(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    layers = config.num_hidden_layers
    changed = change(model, FuseSkipLayerNorm(layers))
    fused = {f"{MICROSOFT}::SkipLayerNormalization": 2 * layers, "LayerNormalization": -2 * layers, "Add": -2 * layers}
    assert changed == fused
    (first,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert first.inputs[0].producer().op_type == "Gather"  # no sum stands before it
    check_same(model, traced(shape), config)


def test_fuse_skip_layer_norm_wants_every_layer(traced: Traced) -> None:
    model = traced("plain")
    norm = [node for node in model.graph if node.op_type == "LayerNormalization"][2]
    norm.op_type = "Another"
    with pytest.raises(ExportError, match="residual sums and layer norms matched 3 places, expected 4"):
        FuseSkipLayerNorm(LAYERS)(model)


@pytest.mark.parametrize("shape", ["plain", "experts"])
def test_fuse_experts_quantized(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    """Against branches over the same weights, at accuracy_level 0; the sizes of its inputs are QMoE's."""
    model, config = traced(shape), read_config(checkpoint(shape))
    layers, experts = config.num_hidden_layers, config.num_local_experts
    changed = change(model, FuseExperts(layers, INT4))
    assert changed[f"{MICROSOFT}::QMoE"] == -changed[f"{DOMAIN}::Experts"] == layers
    assert changed["ScatterElements"] == changed["Log"] == changed["ReduceSum"] == layers
    assert f"{DOMAIN}::SparseMixer" not in changed
    assert f"{DOMAIN}::Attention" not in changed
    qmoe = next(node for node in model.graph if node.op_type == "QMoE")
    _, _, fc1, fc1_scales, _, fc2, fc2_scales = qmoe.inputs
    assert [tuple(value.shape.numpy()) for value in (fc1, fc1_scales, fc2, fc2_scales)] == [
        (experts, 192, 32),
        (experts, 192, 2),
        (experts, 64, 48),
        (experts, 64, 3),
    ]
    assert not [
        name for name in model.graph.initializers if "gate_up_proj" in name and model.graph.initializers[name].uses()
    ]
    level_0(model)
    branched = model.clone()
    BranchExperts(layers, INT4)(branched)
    level_0(branched)
    check_same(model, branched, config)


def level_0(model: ir.Model) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)


def test_fc1_has_gate_and_up_in_turns(traced: Traced) -> None:
    model = traced("plain")
    gate_up = model.graph.initializers["model.layers.1.block_sparse_moe.experts.gate_up_proj"].const_value.numpy()
    gate_up = gate_up.reshape(16, 192, 64).copy()
    exact, quantized = model.clone(), model.clone()
    FuseExperts(LAYERS, None)(exact)
    FuseExperts(LAYERS, INT8)(quantized)
    prefix = "model.layers.1.block_sparse_moe.experts.fc1"
    fc1 = exact.graph.initializers[f"{prefix}.weight"].const_value.numpy()
    np.testing.assert_array_equal(fc1[:, 0::2], gate_up[:, :96])
    np.testing.assert_array_equal(fc1[:, 1::2], gate_up[:, 96:])
    codes, scales = (
        torch.from_numpy(quantized.graph.initializers[f"{prefix}.{kind}"].const_value.numpy())
        for kind in ("codes", "scales")
    )
    np.testing.assert_allclose(INT8.dequantize(codes, scales), fc1, atol=np.abs(fc1).max() / 200)


@pytest.mark.parametrize("shape", ["plain", "experts"])
def test_branch_experts_in_float32(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    layers, experts = config.num_hidden_layers, config.num_local_experts
    change(model, FuseExperts(layers, None))
    assert count(model)[f"{MICROSOFT}::MoE"] == layers
    changed = change(model, BranchExperts(layers, None))
    assert changed["If"] == layers * experts
    assert changed[f"{MICROSOFT}::MoE"] == changed["ScatterElements"] == changed["Log"] == -layers  # dead with it
    inside = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    assert inside["Gemm"] == 2 * layers * experts
    assert inside["ScatterND"] == inside["NonZero"] == layers * experts
    check_same(model, traced(shape), config)


@pytest.mark.parametrize("format", [INT4, INT8])
def test_branches_share_the_operators_bytes(traced: Traced, format: Format) -> None:
    model = traced("plain")
    FuseExperts(LAYERS, format)(model)
    branched = model.clone()
    BranchExperts(LAYERS, format)(branched)
    common.RemoveUnusedNodesPass()(branched)
    prefix = "model.layers.0.block_sparse_moe.experts.fc1"
    for kind in ("codes", "scales"):
        stack = model.graph.initializers[f"{prefix}.{kind}"].const_value
        pieces = [branched.graph.initializers[f"{prefix}.{kind}.{e}"].const_value.pieces for e in range(16)]
        assert sum(pieces, ()) == stack.pieces
    layout = Layout()
    with tempfile.TemporaryDirectory() as folder:
        layout.save(model, Path(folder) / "model.onnx")
        before = layout.nbytes
        layout.save(branched, Path(folder) / "branches.onnx")
    assert layout.nbytes == before > 0


@pytest.mark.parametrize(
    "how", [FuseExperts(LAYERS + 1, None), BranchExperts(LAYERS + 1, None), BranchExperts(LAYERS, INT4)]
)
def test_the_experts_passes_want_every_layer(traced: Traced, how: ir.passes.InPlacePass) -> None:
    model = traced("plain")
    if isinstance(how, BranchExperts):
        FuseExperts(LAYERS, None)(model)
    with pytest.raises(ExportError, match=r"experts matched [02] places, expected [23]"):
        how(model)


def test_branch_experts_wants_what_fuse_experts_leaves(traced: Traced) -> None:
    model = traced("plain")
    FuseExperts(LAYERS, None)(model)
    moe = next(node for node in model.graph if node.op_type == "MoE")
    (user,) = {usage.node for usage in moe.outputs[0].uses()}
    model.graph.outputs.append(moe.outputs[0])
    assert user.op_type == "Mul"
    with pytest.raises(ExportError, match="is not as FuseExperts leaves it"):
        BranchExperts(LAYERS, None)(model)


@pytest.mark.parametrize("shape", ["plain", "longrope", "no-bias", "tied"])
def test_add_optional_inputs(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    expected, *presents = run(model, config)
    assert change(model, AddOptionalInputs()) == {"Slice": 1, "Neg": 1, "ConstantOfShape": 1, "Shape": 1}
    for keep, kept in ((0, 45), (1, 1), (7, 7)):
        logits, *got = run(model, config, rope_length=False, logits_to_keep=keep)
        assert logits.shape == (1, kept, 2048)
        assert_close(logits, expected[:, -kept:])
        assert all(np.array_equal(a, b) for a, b in zip(got, presents, strict=True))


@pytest.mark.parametrize("shape", ["plain", "no-bias", "tied"])
def test_store_projections_as_they_are_used(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    assert change(model, StoreProjections({})) == {"Transpose": -(5 * LAYERS + 1)}
    weight = model.graph.initializers["lm_head.weight.transposed"].const_value
    assert weight.shape == (64, 2048)
    check_same(model, traced(shape), config)


@pytest.mark.parametrize("shape", ["plain", "no-bias", "head_dim"])
def test_store_projections_quantized(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    """The named ones only, each with its bias; against the graph whose weights are dequantised."""
    model, config = traced(shape), read_config(checkpoint(shape))
    biases = (LAYERS if config.attention_bias else 0) + (1 if config.lm_head_bias else 0)
    changed = change(model, StoreProjections({"o_proj": INT8, "lm_head": INT4}))
    added = changed.pop("Add", 0)
    assert added == -biases
    assert changed == {f"{MICROSOFT}::MatMulNBits": LAYERS + 1, "MatMul": -(LAYERS + 1), "Transpose": -(5 * LAYERS + 1)}
    nodes = {node.name: node for node in model.graph if node.op_type == "MatMulNBits"}
    head = nodes["lm_head/MatMulNBits"]
    attributes = {name: attribute.value for name, attribute in head.attributes.items()}
    assert attributes == {"N": 2048, "K": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}
    assert tuple(head.inputs[1].shape.numpy()) == (2048, 2, 16)
    assert (len(head.inputs) > 5) == config.lm_head_bias
    level_0(model)
    dequantized = traced(shape)
    for name, value in dequantized.graph.initializers.items():
        format = INT8 if name.endswith("o_proj.weight") else INT4 if name == "lm_head.weight" else None
        if format:
            weight = torch.from_numpy(value.const_value.numpy().copy())
            value.const_value = ir.tensor(format.dequantize(*format.quantize(weight)).numpy(), name=name)
    check_same(model, dequantized, config)


@pytest.mark.parametrize("shape", ["plain", "tied"])
def test_quantize_embedding(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    assert change(model, QuantizeEmbedding(INT8)) == {f"{MICROSOFT}::GatherBlockQuantized": 1, "Gather": -1}
    dequantized = traced(shape)
    gather = next(
        node
        for node in dequantized.graph
        if node.op_type == "Gather" and isinstance(node.inputs[0].const_value, Weight)
    )
    table = torch.from_numpy(gather.inputs[0].const_value.numpy().copy())
    rounded = ir.tensor(INT8.dequantize(*INT8.quantize(table)).numpy(), name="rounded")
    value = ir.Value(name="rounded", type=gather.inputs[0].type, shape=gather.inputs[0].shape, const_value=rounded)
    dequantized.graph.register_initializer(value)
    gather.replace_input_with(0, value)  # a tied head keeps the exact table
    check_same(model, dequantized, config)
    with pytest.raises(ExportError, match="the embedding matched 0 places, expected 1"):
        QuantizeEmbedding(INT8)(model)


def test_store_half(traced: Traced, checkpoint: Checkpoint) -> None:
    model, config = traced("longrope"), read_config(checkpoint("longrope"))
    FuseAttention(config, "cpu")(model)
    StoreProjections({})(model)
    common.RemoveUnusedNodesPass()(model)
    original = model.clone()
    before = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, Weight)
    }
    changed = change(model, StoreHalf())
    halves = {
        name for name, value in model.graph.initializers.items() if value.const_value.dtype == ir.DataType.FLOAT16
    }
    kept = {name for name in before if name in model.graph.initializers}
    assert changed == {"Cast": len(halves)}
    assert halves == {f"{name}.half" for name in before.keys() - kept}
    assert "lm_head.weight.transposed.half" in halves
    assert "model.layers.1.block_sparse_moe.experts.down_proj.half" in halves
    matrices = {name for name in kept if len(before[name].shape) > 1}
    routers = {f"model.layers.{layer}.block_sparse_moe.gate.weight.transposed" for layer in range(LAYERS)}
    assert matrices == routers | {"cos_cache", "sin_cache"}
    for name in halves:
        exact = before[name.removesuffix(".half")].numpy()
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), exact.astype(np.float16))
    for name in halves:  # PyTorch's rounding is numpy's, so the graph over rounded weights is the same
        value = original.graph.initializers[name.removesuffix(".half")]
        rounded = value.const_value.numpy().astype(np.float16).astype(np.float32)
        value.const_value = ir.tensor(rounded, name=value.name)
    check_same(model, original, config)


def test_store_half_keeps_shared_pieces_shared(traced: Traced) -> None:
    model = traced("plain")
    FuseExperts(LAYERS, None)(model)
    branched = model.clone()
    BranchExperts(LAYERS, None)(branched)
    common.RemoveUnusedNodesPass()(branched)
    store = StoreHalf()
    layout = Layout()
    with tempfile.TemporaryDirectory() as folder:
        for graph in (model, branched):
            store(graph)
        layout.save(model, Path(folder) / "model.onnx")
        before = layout.nbytes
        layout.save(branched, Path(folder) / "branches.onnx")
    assert layout.nbytes == before > 0
