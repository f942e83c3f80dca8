"""Bundles of every shape against PyTorch, what lies in them, and exports that fail without leaving anything behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from phimoe_onnx import export, reference
from phimoe_onnx.bundle import OPTIONAL_INPUTS, Graph, check_files, describe_files, read_manifest
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import CheckpointError, ConfigError, DeviceError, ExportError
from phimoe_onnx.exporter import pipeline, write
from phimoe_onnx.exporter.manifest.chat_format import chat_format
from phimoe_onnx.exporter.staging import Journal, staged
from phimoe_onnx.exporter.write import DataFile
from phimoe_onnx.modeling import PhiMoEForCausalLM
from phimoe_onnx.parity.stored import stored_as, stored_model
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import (
    BASE,
    MODEL,
    SHAPES,
    assert_close,
    feeds,
    make_model,
    open_graph,
    random_ids,
    write_checkpoint,
)

Bundle = Callable[[str, str, str], Path]
Checkpoint = Callable[[str], Path]
ALL_LOGITS = {"logits_to_keep": 0, "rope_length": 0}  # the optional inputs as they are by default
LENGTH = 60  # past the rope boundary of 32 and both windows, 9 and 20


def check_greedy(folder: Path, model: PhiMoEForCausalLM, prompt: int, new: int) -> None:
    runtime = PhiMoE.load(folder, threads=1)
    runtime.eos = frozenset()
    ids = random_ids(prompt)
    assert runtime.generate(ids, max_new_tokens=new).token_ids == reference.greedy(model, ids, new)


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_pytorch(bundle: Bundle, shape: str, target: str) -> None:
    model = make_model(BASE | SHAPES[shape])
    folder = bundle(shape, target, "none")
    session = open_graph(folder / "model.onnx")
    for length in (1, 20, LENGTH):
        ids = random_ids(length)
        logits, *_ = session.run(None, feeds(model.config, [ids]))
        assert logits.dtype == np.float32
        assert_close(logits[0], reference.logits(model, ids))
    check_greedy(folder, model, 20, 40)
    check_greedy(folder, model, LENGTH, 20)


QUANTIZED = [("int4", "model.onnx"), ("int4", "model.branches.onnx"), ("int8", "model.branches.onnx")]


@pytest.mark.parametrize(("quantize", "graph"), QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_graphs_are_pytorch_over_the_stored_weights(
    checkpoint: Checkpoint, bundle: Bundle, bundle_at_level_0: Bundle, shape: str, quantize: str, graph: str
) -> None:
    """At accuracy_level 0; QMoE with 8 bits rounds activations at any level, so its branches stand for it."""
    folder = bundle_at_level_0(shape, quantize, graph)
    exact = reference.load_reference(checkpoint(shape))
    model = stored_model(exact, bundle(shape, "cpu", quantize), read_manifest(bundle(shape, "cpu", quantize)))
    ids = random_ids(LENGTH)
    logits, *_ = open_graph(folder / graph).run(None, feeds(model.config, [ids], **ALL_LOGITS))
    expected = reference.logits(model, ids)
    assert_close(logits[0], expected)
    assert np.abs(expected - reference.logits(exact, ids)).mean() > 1e-3 * expected.std()  # the weights were rounded
    check_greedy(folder, model, 20, 30)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_graphs_of_a_quantized_bundle_agree(bundle: Bundle, shape: str) -> None:
    """As they are shipped, with activations rounded to int8: close on average, since a flipped choice moves a token
    far.
    """
    folder = bundle(shape, "cpu", "int4")
    inputs = feeds(read_config(folder), [random_ids(LENGTH)], **ALL_LOGITS)
    one, other = (
        open_graph(folder / graph).run(["logits"], inputs)[0] for graph in ("model.onnx", "model.branches.onnx")
    )
    assert np.abs(one - other).mean() < 0.05 * one.std()


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_fp16_weights_are_pytorch_over_the_rounded_weights(checkpoint: Checkpoint, bundle: Bundle, target: str) -> None:
    folder = bundle("longrope-window", target, "fp16")
    model = stored_model(reference.load_reference(checkpoint("longrope-window")), folder, read_manifest(folder))
    ids = random_ids(LENGTH)
    logits, *_ = open_graph(folder / "model.onnx").run(None, feeds(model.config, [ids]))
    assert_close(logits[0], reference.logits(model, ids))
    exact = bundle("longrope-window", target, "none")
    assert (folder / "model.data").stat().st_size < 0.6 * (exact / "model.data").stat().st_size


def run_parts(session: Any, model: PhiMoEForCausalLM, ids: list[int], cuts: list[int], **optional: int) -> Any:
    """The logits of a sequence that runs in parts, each over the present of the one before."""
    outputs, past = [], []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        logits, *past = session.run(None, feeds(model.config, [ids[start:end]], past, **optional))
        assert {present.shape for present in past} == {
            (1, model.config.num_key_value_heads, end, model.config.head_dim)
        }
        outputs.append(logits[0])
    return np.concatenate(outputs)


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("shape", ["longrope-window", "heads"])
def test_chunks_and_steps_are_one_pass(bundle: Bundle, shape: str, target: str) -> None:
    """The first chunk of a prompt that will pass the boundary is told so by rope_length."""
    model = make_model(BASE | SHAPES[shape])
    session = open_graph(bundle(shape, target, "none") / "model.onnx")
    ids = random_ids(LENGTH)
    expected = reference.logits(model, ids)
    for cuts in ([30, 31, 59], list(range(1, LENGTH))):
        assert_close(run_parts(session, model, ids, cuts, rope_length=LENGTH), expected)
    if model.config.longrope:
        wrong = run_parts(session, model, ids, [30])
        assert np.abs(wrong - expected).max() > 0.1 * expected.std()


SIDES = [(32, 3, 20, 1), (45, 33, 40, 60)]  # of the rope boundary


@pytest.mark.parametrize("lengths", [*SIDES, sum(SIDES, ())])
@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("shape", ["longrope", "window", "experts"])
def test_rows_padded_on_the_right(bundle: Bundle, shape: str, target: str, lengths: tuple[int, ...]) -> None:
    """Each row has the factors of its own length.

    But for GroupQueryAttention's: it takes the first row's `position_ids` for every row of a first prompt, so rows on
    both sides of the boundary cannot share one there (the runtime gives every row a prefill of its own).
    """
    if (shape, target) == ("longrope", "cpu") and lengths not in SIDES:
        pytest.skip("the operator cannot")
    model = make_model(BASE | SHAPES[shape])
    rows = [random_ids(length) for length in lengths]
    session = open_graph(bundle(shape, target, "none") / "model.onnx")
    logits, *presents = session.run(None, feeds(model.config, rows))
    assert presents[0].shape == (len(rows), model.config.num_key_value_heads, max(lengths), model.config.head_dim)
    for row, got in zip(rows, logits, strict=True):
        assert_close(got[: len(row)], reference.logits(model, row))


@pytest.mark.parametrize(("target", "quantize"), [("cpu", "none"), ("cpu", "int4"), ("portable", "none")])
def test_optional_inputs(bundle: Bundle, target: str, quantize: str) -> None:
    folder = bundle("longrope", target, quantize)
    config = read_config(folder)
    session = open_graph(folder / "model.onnx")
    assert {value.name for value in session.get_overridable_initializers()} == {"logits_to_keep", "rope_length"}
    assert {value.name for value in session.get_inputs()} == feeds(config, [[1]]).keys()
    ids = random_ids(20)
    everything = session.run(["logits"], feeds(config, [ids]))[0]
    assert everything.shape == (1, 20, 2048)
    for keep, shape in [(0, 20), (1, 1), (7, 7), (20, 20), (50, 20)]:
        kept = session.run(["logits"], feeds(config, [ids], logits_to_keep=keep))[0]
        assert kept.shape == (1, shape, 2048)
        np.testing.assert_allclose(kept, everything[:, -shape:], atol=1e-5 * everything.std())
    long = session.run(["logits"], feeds(config, [ids], rope_length=33))[0]
    short = session.run(["logits"], feeds(config, [ids], rope_length=32))[0]
    assert np.array_equal(short, everything)
    assert np.abs(long - everything).max() > 0.1 * everything.std()


@pytest.mark.parametrize("quantize", ["none", "fp16", "int4"])
def test_a_graph_without_optional_inputs_is_the_same(bundle: Bundle, quantize: str) -> None:
    """For languages in which ONNX Runtime takes no values for inputs with a default."""
    folder = bundle("longrope", "cpu", quantize)
    session = open_graph(folder / "model.branches.onnx")
    inputs = feeds(read_config(folder), [random_ids(20)], logits_to_keep=3, rope_length=33)
    assert not session.get_overridable_initializers()
    assert {value.name for value in session.get_inputs()} == inputs.keys()
    logits = session.run(["logits"], inputs)[0]
    assert logits.shape == (1, 3, 2048)
    if quantize != "int4":
        assert np.array_equal(logits, open_graph(folder / "model.onnx").run(["logits"], inputs)[0])


def test_a_shape_without_longrope_ignores_rope_length(bundle: Bundle) -> None:
    folder = bundle("plain", "cpu", "none")
    session = open_graph(folder / "model.onnx")
    inputs = feeds(read_config(folder), [random_ids(20)])
    forced = session.run(["logits"], inputs | {"rope_length": np.array([100])})[0]
    assert np.array_equal(forced, session.run(["logits"], inputs)[0])


def test_portable_takes_an_empty_cache_of_any_width_and_a_full_one_of_its_own(bundle: Bundle) -> None:
    session = open_graph(bundle("head_dim", "portable", "none") / "model.onnx")
    model = make_model(BASE | SHAPES["head_dim"])
    ids = random_ids(20)
    inputs = feeds(model.config, [ids[:19]])
    wide = {name: np.zeros((1, 4, 0, 64 // 4), np.float32) for name in inputs if name.startswith("past")}
    logits, *past = session.run(None, inputs | wide)
    assert_close(logits[0], reference.logits(model, ids[:19]))
    inputs = feeds(model.config, [ids[19:]], past)
    assert_close(session.run(["logits"], inputs)[0][0, -1], reference.logits(model, ids)[-1])
    with pytest.raises(Exception, match=r"past_key_values\.0\.key/Reshape"):
        session.run(None, inputs | {"past_key_values.0.key": np.zeros((1, 4, 19, 32), np.float32)})


WORD = r"(fc[12]|[a-z]+(_[a-z]+)*)"  # val_12 is none
NAME = rf"{WORD}(\.\d+|[./]({WORD}|[A-Z]\w*))*"
NAMED = [("cpu", "none"), ("cpu", "fp16"), ("cpu", "int4"), ("cuda", "none"), ("cuda", "int4"), ("portable", "none")]


@pytest.mark.parametrize(("target", "quantize"), NAMED)
def test_every_node_and_value_has_a_readable_name_with_its_layer(bundle: Bundle, target: str, quantize: str) -> None:
    folder = bundle("longrope-window", target, quantize)
    for graph in read_manifest(folder).graphs:
        model = ir.load(folder / graph.file)
        nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        outputs = [value.name for node in nodes for value in node.outputs if value.name]
        names = [node.name for node in nodes]
        assert len(set(names)) == len(names)
        assert len(set(outputs)) == len(outputs)
        assert {name for name in (*names, *outputs) if not re.fullmatch(NAME, name)} == set()
        assert {name for name in model.graph.initializers if re.fullmatch(r"(val|v|n|tmp)_?\d+(_\d+)?", name)} == set()
        for node in nodes:
            layer = re.match(r"model\.layers\.\d+\.", node.name)
            for value in node.inputs:
                if (
                    value is not None
                    and value.name.startswith("model.layers.")
                    and re.search("weight|bias|codes|scales", value.name)
                ):
                    assert layer is not None
                    assert value.name.startswith(layer[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_portable_is_standard_onnx(bundle: Bundle, shape: str) -> None:
    path = bundle(shape, "portable", "none") / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = ir.load(path)
    assert set(model.opset_imports) == {""}
    assert not model.functions
    assert {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)} == {""}


@pytest.mark.parametrize("shape", ["plain", "longrope-window", "experts"])
def test_portable_runs_in_onnx_itself_and_without_optimisation(bundle: Bundle, shape: str) -> None:
    path = bundle(shape, "portable", "none") / "model.onnx"
    model = make_model(BASE | SHAPES[shape])
    ids = random_ids(40)
    inputs = feeds(model.config, [ids])
    expected = reference.logits(model, ids)
    assert_close(open_graph(path, optimize=False).run(["logits"], inputs)[0][0], expected)
    # the evaluator knows no optional inputs
    optional = {"logits_to_keep": np.array([0]), "rope_length": np.array([0])}
    assert_close(ReferenceEvaluator(str(path)).run(["logits"], inputs | optional)[0][0], expected)


def poison(folder: Path, graph: str, layer: int, experts: set[int]) -> None:
    """Overwrites the weights of some experts of a layer by NaN: all of them, or their scales."""
    model = ir.load(folder / graph)
    prefix = f"model.layers.{layer}.block_sparse_moe.experts."
    poisoned = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if (
            not name.startswith(prefix)
            or not isinstance(tensor, ir.ExternalTensor)
            or tensor.dtype != ir.DataType.FLOAT
        ):
            continue
        single = name.rpartition(".")[2]  # an expert's own matrix ends in its number, a stack does not
        size = tensor.nbytes if single.isdigit() else tensor.nbytes // int(tensor.shape[0])
        with (folder / str(tensor.location)).open("r+b") as data:
            for expert in experts:
                if not single.isdigit() or int(single) == expert:
                    data.seek(tensor.offset + (0 if single.isdigit() else expert * size))
                    data.write(np.full(size // 4, np.nan, np.float32).tobytes())
                    poisoned += 1
    assert poisoned == 2 * len(experts)


@pytest.mark.parametrize(
    ("target", "quantize", "graph"),
    [
        ("portable", "none", "model.onnx"),
        ("cpu", "none", "model.onnx"),
        ("cpu", "int4", "model.onnx"),
        ("cpu", "int4", "model.branches.onnx"),
    ],
)
def test_experts_that_no_token_chose_are_not_computed(
    tmp_path: Path,
    bundle: Bundle,
    bundle_at_level_0: Bundle,
    checkpoint: Checkpoint,
    target: str,
    quantize: str,
    graph: str,
) -> None:
    original = bundle("plain", target, quantize)
    model = stored_model(reference.load_reference(checkpoint("plain")), original, read_manifest(original))
    exact = original if quantize == "none" else bundle_at_level_0("plain", quantize, graph)
    folder = Path(shutil.copytree(exact, tmp_path / "bundle"))
    ids = random_ids(3)
    inputs = feeds(model.config, [ids], **ALL_LOGITS)
    recording, routing = reference.recorded(model)
    reference.logits(recording, ids)
    expected = open_graph(folder / graph).run(["logits"], inputs)[0]
    for layer, chosen in enumerate(routing):
        unused = set(range(16)) - set(chosen.flatten().tolist())
        assert len(unused) >= 10
        poison(folder, graph, layer, unused)
    assert np.array_equal(open_graph(folder / graph).run(["logits"], inputs)[0], expected)
    poison(folder, graph, 1, {int(routing[1][0, -1, 1])})
    assert np.isnan(open_graph(folder / graph).run(["logits"], inputs)[0][0, -1]).any()


@pytest.mark.parametrize(("target", "quantize"), [("cpu", "int4"), ("cpu", "none"), ("portable", "fp16")])
def test_two_exports_are_identical(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, target: str, quantize: str
) -> None:
    first = bundle("longrope-window", target, quantize)
    second = export(
        checkpoint("longrope-window"), tmp_path / "again", target=target, quantize=quantize, operators="stock"
    )
    assert {path.name: path.read_bytes() for path in second.iterdir()} == {
        path.name: path.read_bytes() for path in first.iterdir()
    }


@pytest.mark.parametrize("writer", ["hub", "fused"])
def test_every_writer_gives_the_same_bundle(tmp_path: Path, bundle: Bundle, writer: str) -> None:
    folder = write_checkpoint(tmp_path / "experts", writer, shards=3, **SHAPES["experts"])
    again = export(folder, tmp_path / "bundle", quantize="int4", operators="stock")
    assert describe_files(again) == describe_files(bundle("experts", "cpu", "int4"))


OLD, NEW = {"cpu": "1.29"}, {"cpu": "1.31"}
GRAPHS = {
    ("cpu", "none"): [Graph("model.onnx", OLD, OPTIONAL_INPUTS), Graph("model.branches.onnx", OLD)],
    ("cpu", "fp16"): [Graph("model.onnx", OLD, OPTIONAL_INPUTS), Graph("model.branches.onnx", OLD)],
    ("portable", "none"): [Graph("model.onnx", {"cpu": "1.29", "cuda": "1.29"}, OPTIONAL_INPUTS)],
    ("cpu", "int8"): [Graph("model.onnx", NEW, OPTIONAL_INPUTS), Graph("model.branches.onnx", OLD)],
    ("cpu", "int4"): [Graph("model.onnx", NEW, OPTIONAL_INPUTS), Graph("model.branches.onnx", OLD)],
}


# of the shape longrope-window; int4 is on the two-level grid, with whatever is stored beside it
BLOCK_SIZES = {"int8": 64, "int4": 32}


def form(quantize: str, bundle: str) -> tuple[str, int | None, str | None]:
    """dtype, block size and scales' dtype of a matrix in a bundle."""
    blocks = (quantize, BLOCK_SIZES.get(bundle), "float32")
    return {"none": ("float32", None, None), "fp16": ("float16", None, None)}.get(quantize, blocks)


@pytest.mark.parametrize(("target", "quantize"), GRAPHS)
def test_the_manifest(bundle: Bundle, target: str, quantize: str) -> None:
    folder = bundle("longrope-window", target, quantize)
    manifest = read_manifest(folder)
    assert (manifest.target, manifest.quantize, manifest.dtype, manifest.task) == (
        target,
        quantize,
        "float32",
        "text-generation",
    )
    assert manifest.source == "longrope-window"
    assert list(manifest.graphs) == GRAPHS[target, quantize]
    assert manifest.files == describe_files(folder)
    assert manifest.files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    check_files(folder, manifest, hash_everything=True)
    assert manifest.recipe is not None
    assert manifest.decoding.sampling_graph is None
    layer = {
        f"model.layers.1.{name}": form(quantize, quantize)
        for name in (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            "block_sparse_moe.experts.gate_up_proj",
            "block_sparse_moe.experts.down_proj",
        )
    }
    stored = {name: (each.dtype, each.block_size, each.scale_dtype) for name, each in stored_as(manifest).items()}
    assert layer.items() <= stored.items()
    assert stored["lm_head.weight"] == form(quantize, quantize)
    assert stored["model.embed_tokens.weight"] == form("int8" if quantize == "int4" else quantize, quantize)
    others = {name for name in stored if name.endswith(("norm.weight", "gate.weight", "bias"))}
    assert {stored[name] for name in others} == {("float32", None, None)}
    assert stored.keys() == dict(make_model(BASE | SHAPES["longrope-window"]).named_parameters()).keys()
    assert manifest.parity is None


def test_external_data_is_named_by_relative_paths(bundle: Bundle) -> None:
    folder = bundle("plain", "cpu", "int4")
    for graph in ("model.onnx", "model.branches.onnx"):
        tensors = [value.const_value for value in ir.load(folder / graph).graph.initializers.values()]
        external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        scales = {str(tensor.location) for tensor in external if ".scales" in tensor.name}
        others = {str(tensor.location) for tensor in external if ".scales" not in tensor.name}
        assert (scales, others) == ({"model.scales.data"}, {"model.data"})
        assert all(tensor.offset % 64 == 0 for tensor in external if not tensor.name.rpartition(".")[2].isdigit())


def test_the_bundle_carries_the_checkpoints_files(bundle: Bundle, checkpoint: Checkpoint) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (bundle("plain", "cpu", "none") / name).read_bytes() == (checkpoint("plain") / name).read_bytes()


def test_the_bundle_says_the_chat_template_in_plain_strings(bundle: Bundle, checkpoint: Checkpoint) -> None:
    chat = read_manifest(bundle("plain", "cpu", "none")).chat
    assert chat is not None
    assert chat == chat_format(checkpoint("plain"))


def test_genai_config(tmp_path: Path, bundle: Bundle) -> None:
    folder = export(MODEL, tmp_path / "bundle", quantize="int4", operators="stock")
    config, generation = read_config(MODEL), json.loads((MODEL / "generation_config.json").read_text())
    genai = json.loads((folder / "genai_config.json").read_text())
    model, decoder = genai["model"], genai["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == (
        "phimoe",
        config.vocab_size,
        config.max_position_embeddings,
    )
    assert (model["bos_token_id"], model["eos_token_id"]) == (generation["bos_token_id"], generation["eos_token_id"])
    assert model["pad_token_id"] == generation["pad_token_id"]
    assert decoder["filename"] == "model.onnx"
    assert decoder["head_size"] == config.head_dim
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"):
        assert decoder[key] == getattr(config, key)
    session = open_graph(folder / "model.onnx")
    names = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
    for name in (*decoder["inputs"].values(), *decoder["outputs"].values()):
        assert (name % 3 if "%d" in name else name) in names
    assert genai["search"]["past_present_share_buffer"] is True
    assert genai["search"]["max_length"] == config.max_position_embeddings
    plain = json.loads((bundle("plain", "cpu", "none") / "genai_config.json").read_text())["model"]
    # from config.json
    assert (plain["eos_token_id"], plain["bos_token_id"], plain["pad_token_id"]) == ([2043], 1, 2043)
    assert not (bundle("plain", "portable", "none") / "genai_config.json").exists()


@pytest.mark.parametrize("block_size", [16, 32])
def test_block_sizes(tmp_path: Path, checkpoint: Checkpoint, block_size: int) -> None:
    options: dict[str, Any] = {"quantize": "int4", "operators": "stock"}
    folder = export(checkpoint("plain"), tmp_path / "bundle", block_size=block_size, **options)
    experts = stored_as(read_manifest(folder))["model.layers.0.block_sparse_moe.experts.down_proj"]
    assert (experts.dtype, experts.block_size) == ("int4", block_size)
    scales = ir.load(folder / "model.onnx").graph.initializers["model.layers.0.block_sparse_moe.experts.fc2.scales"]
    assert scales.shape == (16, 64, 96 // block_size)


def test_progress_counts_every_byte(tmp_path: Path, checkpoint: Checkpoint) -> None:
    calls: list[tuple[str, int, int]] = []
    folder = export(checkpoint("plain"), tmp_path / "bundle", progress=lambda *call: calls.append(call))
    writing = [call[1:] for call in calls if call[0] == "writing weights"]
    assert writing == sorted(writing)
    assert writing[-1][0] == writing[-1][1] <= (folder / "model.data").stat().st_size
    assert list(dict.fromkeys(phase for phase, _, _ in calls)) == ["reading", "tracing", "writing weights", "hashing"]


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ("plain", {"target": "tpu"}, ["target is 'tpu'", "cpu, cuda, portable"]),
        ("plain", {"quantize": "int5"}, ["quantize is 'int5'", "none, fp16, int8, int4"]),
        ("plain", {"quantize": "int4", "block_size": 64}, ["64", "intermediate_size 96", "[16, 32]"]),
        ("plain", {"quantize": "int8", "block_size": 0}, ["0", "[16, 32]"]),
        ("plain", {"quantize": "int2", "target": "portable"}, ["portable", "int2", "none or fp16"]),
        (
            "plain",
            {"quantize": "int4", "target": "cuda"},
            ["cuda", "int4", "intermediate_size 96", "multiples of 64", "--quantize none"],
        ),
        ("plain", {"dtype": "bfloat16"}, ["--target cpu has no --dtype bfloat16", "expected float32"]),
        ("plain", {"dtype": "float32", "target": "cuda"}, ["--dtype float32", "float16 or bfloat16"]),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    options: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.setattr(pipeline, "trace", lambda *_: pytest.fail("no work before the check"))
    with pytest.raises(ExportError) as error:
        export(checkpoint(shape), tmp_path / "out" / "bundle", **options)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_small_head_is_pointed_to_portable(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", head_dim=8)
    with pytest.raises(ExportError, match=r"head_dim is 8.*multiple of 16.*portable"):
        export(folder, tmp_path / "bundle")
    path = export(folder, tmp_path / "bundle", target="portable") / "model.onnx"
    model = make_model(BASE | {"head_dim": 8})
    ids = random_ids(20)
    assert_close(open_graph(path).run(["logits"], feeds(model.config, [ids]))[0][0], reference.logits(model, ids))


def test_no_block_size_fits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", intermediate_size=20)
    with pytest.raises(ExportError, match=r"intermediate_size 20.*fp16"):
        export(folder, tmp_path / "bundle", quantize="int4")


def test_an_existing_output_is_left_alone(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = bundle("window", "cpu", "none")
    monkeypatch.setattr(pipeline, "trace", lambda *_: pytest.fail("no work before the check"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep")
    for overwrite, words in ((False, "exists already.*--overwrite"), (True, "no bundle")):
        with pytest.raises(ExportError, match=words):
            export(checkpoint("plain"), folder, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "precious.txt").read_text() == "keep"
    file = tmp_path / "file"
    file.write_text("keep")
    with pytest.raises(ExportError, match="no bundle"):
        export(checkpoint("plain"), file, overwrite=True)
    old = Path(shutil.copytree(window, tmp_path / "bundle"))
    with pytest.raises(ExportError, match="exists already"):
        export(checkpoint("plain"), old)
    monkeypatch.undo()
    assert export(checkpoint("plain"), old, overwrite=True) == old
    assert describe_files(old) == describe_files(bundle("plain", "cpu", "none"))


def test_the_output_is_named_after_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "Phi-x", num_hidden_layers=1, num_local_experts=2)
    monkeypatch.chdir(tmp_path)
    assert export(folder, quantize="int4") == Path("Phi-x-cpu-int4")
    assert (tmp_path / "Phi-x-cpu-int4" / "manifest.json").is_file()


def test_an_output_that_cannot_be_written(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is found before anything is read or downloaded."""
    monkeypatch.setattr(pipeline, "resolve", lambda *_: pytest.fail("no work before the check"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file/bundle: cannot be written"):
        export(checkpoint("plain"), tmp_path / "file" / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_seen_before_writing(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"the weights need 0\.00 GB, but only 0\.00 GB are free"):
        export(checkpoint("plain"), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fail_at", [0, 20])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    calls, write = 0, DataFile.write

    def fill_up(file: DataFile, data: memoryview, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls > fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data, offset)

    monkeypatch.setattr(DataFile, "write", fill_up)
    with pytest.raises(ExportError, match="No space left on device"):
        export(checkpoint("plain"), tmp_path / "bundle")
    assert calls > fail_at
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(nbytes) -> the folder of an empty file system of that size."""
    disks: list[Path] = []

    def mount(nbytes: int) -> Path:
        folder = tmp_path / f"disk-{nbytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a file system is not permitted here")
        disks.append(folder)
        return folder

    yield mount
    for folder in disks:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Callable[[int], Path], checkpoint: Checkpoint, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full at once, in the graphs, the weights, or the files that are copied after them."""
    original, graphs = pipeline.trace, []
    monkeypatch.setattr(
        pipeline, "trace", lambda *arguments: (graphs or graphs.append(original(*arguments)) or graphs)[0].clone()
    )
    monkeypatch.setattr(pipeline, "_check_room", lambda *_: None)  # as if another program filled the disk meanwhile
    weights = sum(path.stat().st_size for path in bundle("plain", "cpu", "none").glob("*.data"))
    reasons = set()
    for share in (0.01, 0.05, 0.5, 0.98, 1.05):
        disk = small_disk(int(weights * share))
        with pytest.raises(ExportError) as error:
            export(checkpoint("plain"), disk / "bundle")
        reasons.add(str(error.value).removeprefix(f"{disk}/").split(";")[0])
        assert not list(disk.iterdir())
    assert reasons == {
        "bundle: cannot be written (No space left on device)",
        ".bundle.partial: writing the weights failed (No space left on device)",
    }


def interrupt_after(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    """Makes an export stop as by Ctrl-C when it has written so many jobs."""
    add = Journal.add

    def interrupt(journal: Journal, job: int) -> None:
        add(journal, job)
        if len(Path(journal._file.name).read_text().splitlines()) > jobs:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupt)


def count_jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the jobs that an export runs from now on."""
    run: list[int] = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda journal, job: (run.append(job), add(journal, job))[1])
    return run


def test_an_interrupted_export_goes_on_where_it_was(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, uninterrupted = tmp_path / "bundle", bundle("plain", "cpu", "int4")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 30)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint("plain"), output, quantize="int4", operators="stock")
    assert not output.exists()
    jobs = count_jobs(monkeypatch)
    export(checkpoint("plain"), output, quantize="int4", operators="stock")
    resumed = len(jobs)
    assert describe_files(output) == describe_files(uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    export(checkpoint("plain"), output, quantize="int4", operators="stock", overwrite=True)
    assert len(jobs) - resumed == resumed + 30 > 30  # all of them


def test_what_another_checkpoint_left_is_not_used(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    other = write_checkpoint(tmp_path / "other" / "plain", seed=5)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 30)
        with pytest.raises(KeyboardInterrupt):
            export(other, output)
    export(checkpoint("plain"), output)
    assert describe_files(output) == describe_files(bundle("plain", "cpu", "none"))


def test_one_export_at_a_time_writes_a_bundle(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with staged(tmp_path / "bundle"), pytest.raises(ExportError, match="another export is writing this bundle"):
        export(checkpoint("plain"), tmp_path / "bundle")


def test_short_writes_are_continued(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(FileIO):
        """A file that takes a part of what it is given, as a system may."""

        def write(self, data: Any) -> int:
            return super().write(data[:10_000]) or 0

    whole = describe_files(bundle("plain", "cpu", "none"))
    monkeypatch.setattr(write, "FileIO", Short)
    folder = export(checkpoint("plain"), tmp_path / "bundle")
    assert describe_files(folder) == whole


def test_a_copy_that_fails_leaves_nothing(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(ExportError, match=r"bundle: cannot be written \(No space left on device\)"):
        export(checkpoint("plain"), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_shard_that_breaks_during_the_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "in" / "checkpoint", num_hidden_layers=1, num_local_experts=2)
    original = pipeline.trace

    def cut_then_trace(*arguments: Any) -> ir.Model:
        shard = folder / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-8])
        return original(*arguments)

    monkeypatch.setattr(pipeline, "trace", cut_then_trace)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* cannot be read"):
        export(folder, tmp_path / "out" / "bundle")
    assert not list((tmp_path / "out").iterdir())


def test_a_failing_export_keeps_the_bundle_that_it_would_replace(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path(shutil.copytree(bundle("plain", "cpu", "none"), tmp_path / "bundle"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="are free"):
        export(checkpoint("window"), old, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert describe_files(old) == describe_files(bundle("plain", "cpu", "none"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/nowhere"])
def test_a_source_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        export(name, tmp_path / "bundle")


def test_a_source_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        export(MODEL / "config.json", tmp_path / "bundle")


def test_a_source_without_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        export(tmp_path / "empty", tmp_path / "bundle")


def test_bfloat16_checkpoints_export_exactly(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", shards=2, dtype=torch.bfloat16)
    path = export(folder, tmp_path / "bundle") / "model.onnx"
    model = reference.load_reference(folder)
    ids = random_ids(LENGTH)
    assert_close(open_graph(path).run(["logits"], feeds(model.config, [ids]))[0][0], reference.logits(model, ids))


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_bfloat16_is_the_float16_graph_in_another_type(
    tmp_path: Path, checkpoint: Checkpoint, bundle: Bundle, quantize: str
) -> None:
    folder = export(checkpoint("tiles-xqa"), tmp_path / "bundle", target="cuda", quantize=quantize, dtype="bfloat16")
    manifest, half = read_manifest(folder), bundle("tiles-xqa", "cuda", quantize)
    assert (manifest.dtype, manifest.decoding.cache.dtype) == ("bfloat16", "bfloat16")
    ours, theirs = (ir.load(path / "model.onnx") for path in (folder, half))
    assert [(node.op_type, node.name) for node in ours.graph] == [(node.op_type, node.name) for node in theirs.graph]
    swap = {ir.DataType.FLOAT16: ir.DataType.BFLOAT16}
    for name, tensor in ours.graph.initializers.items():
        assert tensor.dtype == swap.get(theirs.graph.initializers[name].dtype, theirs.graph.initializers[name].dtype)
    assert {value.dtype for value in ours.graph.inputs if value.name.startswith("past")} == {ir.DataType.BFLOAT16}
    assert ours.graph.outputs[0].dtype == ir.DataType.FLOAT
    with pytest.raises(DeviceError, match="runs on cuda, not on cpu"):
        PhiMoE.load(folder)


def test_what_onnxruntimes_cuda_provider_cannot_do_stays_out_of_its_graphs(bundle: Bundle) -> None:
    """Shape feeds no arithmetic on the device, no operator needs cuDNN, and steps without an XQA kernel do not rotate
    inside.
    """
    for shape, inside in (("tiles", 0), ("tiles-xqa", 1)):
        folder = bundle(shape, "cuda", "int4")
        graph = ir.load(folder / "model.onnx").graph
        manifest = read_manifest(folder)
        assert [each.devices for each in manifest.graphs] == [{"cuda": "1.31", "cpu": "1.32"}]
        assert manifest.decoding.sampling_graph == "sampling.onnx"
        attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
        assert {node.attributes["do_rotary"].as_int() for node in attention} == {inside}
        assert {"ReduceMax", "ArgMax", "If", "Loop"} & {node.op_type for node in graph} == set()
        readers = {use.node.op_type for node in graph if node.op_type == "Shape" for use in node.outputs[0].uses()}
        assert readers <= {"Squeeze", "Concat", "Neg"}  # all of them in the host's memory
