"""Recipes: what is stored how, what is refused and why, and a bundle of several widths through all tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from phimoe_onnx import export, verify
from phimoe_onnx.bench.traffic import step_bytes
from phimoe_onnx.bundle import describe_files, read_manifest
from phimoe_onnx.checkpoint.tensors import shapes
from phimoe_onnx.cli.export import main
from phimoe_onnx.config import parse_config, read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter import recipe as module
from phimoe_onnx.exporter.kinds import stored_sizes
from phimoe_onnx.exporter.plan import requirements
from phimoe_onnx.exporter.quantize.format import Format, Plain
from phimoe_onnx.exporter.recipe import default_operators, recipe_for
from phimoe_onnx.exporter.staging import Journal
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.parity.stored import stored_as
from phimoe_onnx.parity.thresholds import DEFAULTS, Thresholds, default_thresholds
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import BASE, SHAPES, TASKS, make_model, random_ids

Checkpoint = Callable[[str], Path]
CPU = TARGETS["cpu"]
CONFIG = parse_config(BASE)
MOE = "model.layers.{}.block_sparse_moe.experts."
DOWN, GATE_UP = MOE + "down_proj", MOE + "gate_up_proj"
LOOSE = Thresholds(kl=0.5, kernel_kl=0.1, perplexity_ratio=1.2)  # a random model's logits say little


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_of_modeling_has_a_form(shape: str, task: str) -> None:
    raw = BASE | SHAPES[shape] | TASKS[task]
    config = parse_config(raw)
    expected = {name: tuple(parameter.shape) for name, parameter in make_model(raw).named_parameters()}
    assert shapes(config, task) == expected
    recipe = recipe_for(config, CPU, "int4", task=task, operators="stock")
    tied = {"lm_head.weight"} if config.tie_word_embeddings and task == "text-generation" else set()
    assert recipe.forms.keys() == expected.keys() | tied
    described = [name for group in recipe.stored_weights() for name in group.names()]
    assert sorted(described) == sorted(recipe.forms)


def test_the_last_pattern_that_matches_counts() -> None:
    store = {"*": "int8", "model.layers.0.*": "int4", "lm_head.weight": "fp16", "*.1.*down_proj": "none"}
    recipe = recipe_for(CONFIG, CPU, "none", store=store, block_size=16, operators="stock")
    assert recipe.form("model.embed_tokens.weight") == Format(8, 16)
    assert recipe.form("model.layers.0.self_attn.q_proj.weight") == Format(4, 16)
    assert recipe.form("model.layers.1.self_attn.q_proj.weight") == Format(8, 16)
    assert recipe.form(DOWN.format(1)) == Plain("float32")
    assert recipe.form("lm_head.weight") == Plain("float16")
    # the router, whatever matches
    assert recipe.form("model.layers.0.block_sparse_moe.gate.weight") == Plain("float32")


def test_runs_of_equal_layers_are_one_group() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=5)
    store = {DOWN.format(2): "int8", DOWN.format(4) + ".3": "int8"}
    groups = recipe_for(config, CPU, "int4", store=store, operators="stock").stored_weights()
    experts = [
        (group.layers, group.dtype, [name.rpartition("experts.")[2] for name in group.parameters if "experts" in name])
        for group in groups
    ]
    others = [f"down_proj.{e}" for e in range(16) if e != 3]
    assert [entry for entry in experts if entry[2]] == [
        ((0, 1), "int4", ["gate_up_proj", "down_proj"]),
        ((2, 2), "int4", ["gate_up_proj"]),
        ((2, 2), "int8", ["down_proj"]),
        ((3, 3), "int4", ["gate_up_proj", "down_proj"]),
        ((4, 4), "int4", ["gate_up_proj", *others]),
        ((4, 4), "int8", ["down_proj.3"]),
    ]


@pytest.mark.parametrize(
    ("target", "quantize", "store", "graphs"),
    [
        ("cpu", "int4", {}, ["fused", "branches"]),
        ("cpu", "int4", {"lm_head.weight": "int8", "model.layers.0.*": "int8"}, ["fused", "branches"]),
        ("cpu", "int4", {"*.down_proj": "int8"}, ["branches", "branches"]),
        ("cpu", "int4", {"*.down_proj.7": "int8"}, ["branches", "branches"]),
        ("cpu", "int4", {DOWN.format(1): "fp16", GATE_UP.format(1): "fp16"}, ["branches", "branches"]),
        ("cpu", "none", {"*.experts.*": "int8"}, ["fused", "branches"]),
        ("portable", "none", {"lm_head.weight": "fp16"}, ["branches"]),
    ],
)
def test_experts_of_one_layer_that_differ_have_branches_only(
    target: str, quantize: str, store: dict[str, str], graphs: list[str]
) -> None:
    recipe = recipe_for(CONFIG, TARGETS[target], quantize, store=store, operators="stock")
    assert [experts for experts, _ in recipe.graphs().values()] == graphs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"store": {"head": "int8"}}, ["--store head=int8", "no parameter is called so", "lm_head.weight"]),
        ({"store": {"lm_head.weight": "int5"}}, ["--store lm_head.weight=int5", "none, fp16, int8, int4, int3, int2"]),
        ({"store": {"lm_head.weight": "int3"}}, ["--target cpu has no int3", "--operators native 3 as well"]),
        ({"quantize": "int2", "target": "cuda"}, ["--target cuda has no int2", "4 and 8 bits"]),
        ({"quantize": "int2", "target": "portable"}, ["--target portable has no int2", "4 and 8 bits"]),
        ({"quantize": "int2", "block_size": 16}, ["int2 in blocks of 16", "32, 64 and 128"]),
        ({"quantize": "int2", "calibrate": True}, ["rounding is 'calibrated'", "int2", "takes 'rtn'"]),
        ({"quantize": "int4", "store": {"*embed*": "int2"}}, ["--store: model.embed_tokens.weight is int2, block 32"]),
        ({"store": {"*.gate.weight": "int8"}}, ["--store *.gate.weight=int8", "is always float32", "router"]),
        ({"store": {"*norm*": "int8"}}, ["norm", "is always float32", "only matrices"]),
        ({"store": {"*.q_proj.weight": "int8"}}, ["q_proj int8, block 32, k_proj float32", "one matrix", "alike"]),
        ({"store": {"lm_head.weight": "int8"}, "block_size": 64}, ["--block-size is 64", "[16, 32]"]),
        (
            {"store": {"model.embed_tokens.weight": "int4"}, "target": "portable"},
            ["--store: model.embed_tokens.weight is int4", "takes int8 and no int4"],
        ),
        (
            {"store": {"*.down_proj": "int8"}, "target": "cuda"},
            ["--target cuda has no", "one layer", "store them alike"],
        ),
        ({"quantize": "int4", "target": "cuda"}, ["--target cuda has no int4", "multiples of 64"]),
        ({"operators": "native"}, ["--operators native", "int2 to int8", "--quantize int4"]),
        ({"operators": "fast"}, ["--operators is 'fast'", "stock or native"]),
        (
            {"operators": "native", "target": "portable", "quantize": "fp16"},
            ["--target portable has no --operators nat"],
        ),
        ({"operators": "native", "quantize": "int4", "block_size": 64}, ["--block-size is 64", "blocks of 32"]),
        ({"operators": "native", "quantize": "int4", "rounding": "rtn"}, ["rounding is 'rtn'", "takes 'two-level'"]),
        (
            {"operators": "native", "quantize": "int4", "store": {"*.1.*.down_proj": "fp16"}},
            ["layers.1.block_sparse_moe.experts.down_proj is stored as float16", "one of int8, int4, int3 and int2"],
        ),
        (
            {"operators": "native", "quantize": "int4", "store": {"*.gate_up_proj.3": "int8"}},
            ["gate_up_proj is stored as int4 in strips and int8 in strips"],
        ),
        ({"quantize": "int4", "rounding": "two-level", "block_size": 64}, ["--block-size is 64", "[16, 32]"]),
        ({"kv_cache": "int8", "task": "feature-extraction"}, ["--task feature-extraction has no --kv-cache int8"]),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_reason(options: dict[str, Any], words: list[str]) -> None:
    target = TARGETS[options.pop("target", "cpu")]
    with pytest.raises(ExportError) as error:
        recipe_for(CONFIG, target, options.pop("quantize", "none"), **{"operators": "stock"} | options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "options", "rounding", "block_sizes"),
    [
        ("cpu", {"quantize": "int4"}, "two-level", {4: 32, 8: 32}),
        ("cpu", {"quantize": "int4", "rounding": "rtn"}, "rtn", {4: 64, 8: 64}),
        ("cpu", {"store": {"lm_head.weight": "int4"}}, "two-level", {4: 32}),
        ("cpu", {"quantize": "int8", "store": {"*.down_proj": "int4"}}, "two-level", {4: 32, 8: 32}),
        ("cpu", {"quantize": "int8"}, "rtn", {8: 64}),
        ("cpu", {"quantize": "int2"}, "rtn", {2: 64, 8: 64}),
        ("cpu", {"quantize": "int2", "store": {"lm_head.weight": "int4"}}, "two-level", {2: 64, 4: 32, 8: 32}),
        ("cpu", {"quantize": "int4", "calibrate": True}, "calibrated", {4: 32, 8: 32}),
        ("portable", {"quantize": "int4"}, "rtn", {4: 64, 8: 64}),
        ("cuda", {"quantize": "int4"}, "rtn", {4: 64, 8: 64}),
    ],
)
def test_int4_for_the_cpu_is_on_the_grid_of_the_native_operators(
    target: str, options: dict[str, Any], rounding: str, block_sizes: dict[int, int]
) -> None:
    """And whatever is beside it, but for 2 bits; all else is to nearest."""
    config = parse_config(BASE | SHAPES["tiles"])
    recipe = recipe_for(config, TARGETS[target], **options, operators="stock")
    forms = {form for each in recipe.forms.values() for form in each}
    assert recipe.rounding == rounding
    assert {form.bits: form.block_size for form in forms if isinstance(form, Format)} == block_sizes


FORMS = {"lm_head.weight": "int8", "*.down_proj": "int8"}


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(
    ("target", "quantize", "options", "native"),
    [
        ("cpu", "int8", {}, True),
        ("cpu", "int4", {}, True),
        ("cpu", "int2", {}, True),
        ("cpu", "int4", {"store": FORMS, "kv_cache": "int8", "block_size": 32, "rounding": "two-level"}, True),
        ("cpu", "int4", {"calibrate": True, "dtype": "float32"}, True),
        ("cpu", "none", {"store": {"*.experts.*": "int8"}}, True),
        ("cpu", "none", {}, False),
        ("cpu", "fp16", {}, False),
        ("cpu", "none", {"store": {"lm_head.weight": "int8"}}, False),
        ("cpu", "int4", {"store": {"*.gate_up_proj.3": "int8"}}, False),
        ("cpu", "int4", {"rounding": "rtn"}, False),
        ("cpu", "int4", {"block_size": 16}, False),
        ("cpu", "int4", {"kv_cache": "int4"}, False),
        ("cpu", "int4", {"task": "text-classification"}, False),
        ("cpu", "int4", {"task": "feature-extraction"}, False),
        ("cuda", "int4", {}, False),
        ("portable", "int4", {}, False),
    ],
)
def test_operators_are_native_by_default_where_they_take_everything(
    monkeypatch: pytest.MonkeyPatch, target: str, quantize: str, options: dict[str, Any], native: bool, built: bool
) -> None:
    monkeypatch.setattr(module, "library", lambda: Path("library") if built else None)
    config = parse_config(BASE | SHAPES["tiles"] | TASKS[options.get("task", "text-generation")])
    expected = "native" if native and built else "stock"
    recipe = recipe_for(config, TARGETS[target], quantize, **options)
    assert recipe.operators == expected
    assert recipe == recipe_for(config, TARGETS[target], quantize, **options, operators=expected)
    lacking = native and not built
    assert default_operators(config, TARGETS[target], [quantize], **options) == (expected, lacking)


def test_what_native_operators_alone_take_needs_their_library_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library", lambda: Path("library"))
    assert recipe_for(CONFIG, CPU, "int3").operators == "native"
    assert recipe_for(CONFIG, CPU, "int4", kv_cache="fp16").operators == "native"
    monkeypatch.setattr(module, "library", lambda: None)
    with pytest.raises(ExportError, match=r"--target cpu has no int3: .*--operators native 3 as well"):
        recipe_for(CONFIG, CPU, "int3")
    with pytest.raises(ExportError, match=r"--target cpu has no --kv-cache fp16: .*use --operators native"):
        recipe_for(CONFIG, CPU, "int4", kv_cache="fp16")


def test_larger_blocks_of_int4_need_the_other_rounding() -> None:
    config = parse_config(BASE | SHAPES["tiles"])
    with pytest.raises(ExportError, match=r"--block-size is 64, .* 16 or 32 weights share .* --rounding rtn"):
        recipe_for(config, CPU, "int4", block_size=64, operators="stock")
    assert recipe_for(config, CPU, "int4", block_size=64, rounding="rtn").form("lm_head.weight") == Format(4, 64)


def test_the_digest_tells_recipes_apart() -> None:
    int4 = partial(recipe_for, CONFIG, CPU, "int4", operators="stock")
    recipes = [
        int4(),
        int4(operators="native"),
        int4(block_size=16),
        int4(kv_cache="int8"),
        int4(store={"lm_head.weight": "int8"}),
        int4(store={"*.down_proj.1": "int8"}),
        int4(store={"*.down_proj.2": "int8"}),
        recipe_for(CONFIG, TARGETS["portable"], "none"),
        recipe_for(CONFIG, CPU, "none"),
    ]
    assert len({recipe.digest() for recipe in recipes}) == len(recipes)
    assert (
        recipe_for(CONFIG, CPU, "int8", store={"*": "int4"}).digest()
        == recipe_for(CONFIG, CPU, "none", store={"*": "int4"}).digest()
    )


MIXES: dict[str, dict[str, str]] = {
    "layers": {"lm_head.weight": "int8", "model.layers.0.*": "int8"},
    "kinds": {"*.self_attn.*": "int8", "*.down_proj": "int8", "lm_head.weight": "fp16"},
    "experts": {"*.down_proj.1": "int8", "*.gate_up_proj.2": "none", "*.o_proj.weight": "none"},
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_bundle_of_several_widths_goes_through_every_tool(
    tmp_path: Path,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mix: str,
) -> None:
    source, store, output = checkpoint("longrope-window"), MIXES[mix], tmp_path / "bundle"
    options = [f"--store={pattern}={form}" for pattern, form in store.items()]
    arguments = [str(source), "--quantize", "int4", "--operators", "stock", "-o", str(output), *options]

    # the plan
    assert main([*arguments, "--target", "cpu", "--plan"]) == 0
    assert "cpu     int4" in capsys.readouterr().out
    config = read_config(source)
    recipe = recipe_for(config, CPU, "int4", store=store, operators="stock")

    # the export, its summary and what lies on the disk
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    attention = next(line for line in printed.splitlines() if "attention" in line)
    assert {"layers": "int8, block 32; int4, block 32", "kinds": "int8, block 32", "experts": "float32"}[
        mix
    ] in attention
    manifest = read_manifest(output)
    assert manifest.recipe == recipe.digest()
    assert manifest.weights == recipe.stored_weights()
    fused = [graph.devices == {"cpu": "1.31"} for graph in manifest.graphs]
    assert fused == [mix == "layers", False]
    stored = sum(stored_sizes(output).values())
    tables = 2 * (32 + 128) * 8 * 4
    matrices = sum(
        sum(form.nbytes(_rows(shapes(config)[name]) // len(forms), shapes(config)[name][-1]))
        for name, forms in recipe.forms.items()
        for form in forms
    )
    assert stored == matrices + tables
    assert requirements(config, recipe).bundle == pytest.approx(
        stored + sum(path.stat().st_size for path in output.glob("*.onnx")), rel=0.2
    )

    # killed and resumed; what another recipe left is not used
    whole = describe_files(output)
    again = tmp_path / "again"
    add, written = Journal.add, []

    def interrupt(journal: Journal, job: int) -> None:
        add(journal, job)
        written.append(job)
        if len(written) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(source, again, quantize="int4", store=store, operators="stock")
    before = len(written)
    monkeypatch.setattr(Journal, "add", lambda journal, job: (written.append(job), add(journal, job))[1])
    export(source, again, quantize="int4", store=store, operators="stock")
    assert describe_files(again) == whole
    assert sorted(written) == list(range(len(written)))  # every job once
    assert len(written) > before

    # both graphs run, and are PyTorch over the stored weights
    inputs = random_ids(40)
    assert len(PhiMoE.load(output).generate(inputs, max_new_tokens=4).token_ids) > 0
    report = verify(output, source, tokens=200, new_tokens=4, thresholds=LOOSE)
    assert report.failures == []
    assert default_thresholds(manifest) == DEFAULTS[4]

    # bench
    bits = {"int4": 5.0, "int8": 9.0, "float16": 16.0, "float32": 32.0}
    forms = stored_as(manifest)
    expected = sum(
        _weights(name, config) * bits[form.dtype] / 8 * (2 / 16 if "experts" in name else 1)
        for name, form in forms.items()
    )
    cache = 40 * manifest.decoding.cache.bytes_per_token
    assert step_bytes(output, manifest, 1, 20) == pytest.approx(expected + cache / 2, rel=1e-6)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 3 else 1) if len(shape) > 1 else 1


def _weights(name: str, config: Any) -> int:
    """Of a parameter that a step reads: a matrix, and none of the embeddings."""
    whole = shapes(config)
    shape = whole.get(name)
    if shape is None:
        shape = whole[name.rpartition(".")[0]][1:]
    if len(shape) < 2 or "embed_tokens" in name:
        return 0
    return _rows(shape) * shape[-1]


def test_jobs_begin_in_the_order_of_layers(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rounding that needs what the layers before have become relies on."""
    from phimoe_onnx.exporter import write

    begun: list[int] = []
    run = write._write

    def note(job: Any, *rest: Any) -> None:
        begun.append(job.layer)
        run(job, *rest)

    monkeypatch.setattr(write, "_write", note)
    monkeypatch.setattr(write.os, "cpu_count", lambda: 1)
    folder = export(checkpoint("plain"), tmp_path / "bundle", quantize="int4", operators="stock")
    assert begun == sorted(begun)
    assert {0, 1} < set(begun)
    assert len(ir.load(folder / "model.onnx").graph.initializers) > 0


def test_store_is_an_option_of_python_too(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = export(checkpoint("tied"), tmp_path / "bundle", quantize="int4", store={"lm_head.weight": "int8"})
    forms = stored_as(read_manifest(folder))
    assert {name: forms[name].dtype for name in ("lm_head.weight", "model.embed_tokens.weight")} == {
        "lm_head.weight": "int8",
        "model.embed_tokens.weight": "int8",
    }
    assert json.loads((folder / "manifest.json").read_text())["recipe"] == read_manifest(folder).recipe
