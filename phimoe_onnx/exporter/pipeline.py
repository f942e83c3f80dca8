"""export(): checkpoint -> bundle, the steps in order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from phimoe_onnx import bundle
from phimoe_onnx._version import __version__
from phimoe_onnx.checkpoint.adapter import Adapter, read_adapter
from phimoe_onnx.checkpoint.headers import Stored
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.checkpoint.source import COPIED, fetch_weights, origin, resolve, task_for
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import PhiMoEConfig, for_transformers, read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.calibrate import calibrate as run_calibration
from phimoe_onnx.exporter.calibration_folder import CalibrationFolder, Facts, check_calibration
from phimoe_onnx.exporter.calibration_text import CalibrationText, calibration_text
from phimoe_onnx.exporter.gains import even_gains
from phimoe_onnx.exporter.manifest.chat_format import chat_format
from phimoe_onnx.exporter.manifest.decoding import read_decoding, read_generation
from phimoe_onnx.exporter.manifest.genai import genai_config
from phimoe_onnx.exporter.manifest.tokens import check_tokens
from phimoe_onnx.exporter.passes.attention import FuseAttention
from phimoe_onnx.exporter.passes.cache import ReshapeCache
from phimoe_onnx.exporter.passes.embedding import QuantizeEmbedding
from phimoe_onnx.exporter.passes.experts_branches import BranchExperts
from phimoe_onnx.exporter.passes.experts_fused import FuseExperts
from phimoe_onnx.exporter.passes.experts_native import NativeExperts
from phimoe_onnx.exporter.passes.experts_stored import StoreExperts
from phimoe_onnx.exporter.passes.half import StoreHalf
from phimoe_onnx.exporter.passes.half_cache import HalveCache
from phimoe_onnx.exporter.passes.logits import AddOptionalInputs, RequireInputs
from phimoe_onnx.exporter.passes.names import NameNodes
from phimoe_onnx.exporter.passes.norms import FuseSkipLayerNorm
from phimoe_onnx.exporter.passes.projections import StoreProjections
from phimoe_onnx.exporter.passes.quantized_cache import QuantizeCache
from phimoe_onnx.exporter.plan import tokens_to_read
from phimoe_onnx.exporter.recipe import INTEGERS, MIXED, NO_LIBRARY, Recipe, default_operators, recipe_for
from phimoe_onnx.exporter.sampling import sampling_graph
from phimoe_onnx.exporter.staging import Journal, check_output, staged
from phimoe_onnx.exporter.target import target_named
from phimoe_onnx.exporter.tokenizer import check_text, tokenizer_files
from phimoe_onnx.exporter.trace import trace
from phimoe_onnx.exporter.weights import DTYPES
from phimoe_onnx.exporter.widths import Widths, check_widths, chosen_recipe
from phimoe_onnx.exporter.write import Layout, write_weights
from phimoe_onnx.files import read_json
from phimoe_onnx.progress import Progress, counter

logger = logging.getLogger(__name__)

# by what a recipe calls them
EXPERTS: dict[str, type[FuseExperts] | type[BranchExperts] | type[NativeExperts]] = {
    "fused": FuseExperts,
    "branches": BranchExperts,
    "native": NativeExperts,
}


def export(
    source: str | Path,
    output: str | Path | None = None,
    *,
    task: str | None = None,
    quantize: str = "none",
    target: str = "cpu",
    block_size: int | None = None,
    kv_cache: str = "none",
    dtype: str | None = None,
    store: Mapping[str, str] | None = None,
    operators: str | None = None,
    rounding: str | None = None,
    calibrate: bool | str | Path = False,
    calibration_tokens: int | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    bits: float | None = None,
    fit: int | None = None,
    text: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the bundle of the PhiMoE checkpoint `source`.

    Args:
        source: a local folder or a hub id.
        output: the bundle's folder; by default `<name>-<target>-<quantize>` in the working directory.
        task: "text-generation", "text-classification" (`PhimoeForSequenceClassification`) or "feature-extraction" (any
            PhiMoE, its head left out); by default the one that config.json's architectures name.
        quantize: "none" (float32 for the CPU, float16 for CUDA), "fp16" (weights stored as float16), "int8", "int4",
            "int3" or "int2" (experts, attention and lm_head block-wise in that width, embeddings int8, router float32;
            "int3" with native operators alone, "int2" for the CPU).
        target: "cpu", "cuda", or "portable" for standard ONNX operators only.
        block_size: how many neighbours of a row share a scale; by default the largest number up to 64, on the two-level
            grid up to 32, that fits the shape.
        kv_cache: "none" (the dtype of the activations), "fp16" (with native operators), "int8" or "int4": how keys and
            values are cached.
        dtype: of the activations, on CUDA "float16" (the default) or "bfloat16"; the other targets have "float32" only.
        store: forms of `quantize` for single matrices, on top of it: {"lm_head.weight": "int8"}. A key is a name or a
            pattern (fnmatch) over modeling.py's parameter names, for one expert of a stack with its number behind:
            "model.layers.0.block_sparse_moe.experts.down_proj.3"; the last that matches counts.
        operators: whose operators compute with weights in integers: "stock", ONNX Runtime's, which run anywhere, or
            "native", this project's, which the program that loads the bundle must have; by default native where their
            library is here and they take all other options, attention and cache too, else stock.
        rounding: how weights are rounded: "rtn", to nearest, or "two-level", the grid of the native operators, on which
            both kinds of operators compute with the same weights (2 bits of stock operators are to nearest there, too);
            by default two-level with native operators and, for the CPU, wherever int4 is among the forms.
        calibrate: True, or a file with a text in UTF-8: integer weights are rounded for what they are given when
            the model reads a text, the package's own where none is named. Takes hours for the large models; a killed
            export goes on after its last finished layer.
        calibration_tokens: how much of that text is read at the most, by default 65,536 tokens.
        adapter: the folder of a LoRA adapter as peft saves it, which is merged into the weights.
        revision: branch, tag or commit, for a hub id; `token` likewise.
        overwrite: replace an existing bundle; otherwise an existing output is an error.
        bits: in place of `quantize`: so many bits a weight on average, all parameters and their scales counted, each
            kind of matrix of each layer in the width that serves the whole best.
        fit: in place of `quantize` and `bits`: the same, by the bundle's size on disk, in bytes.
        text: what the widths of `bits` and `fit` are measured on; a passage of the package by default.
        progress: called with a phase, the bytes done and the bytes to do.

    Returns:
        The bundle's folder, which appears only when it is complete.

    Raises:
        ConfigError, CheckpointError: the source is no PhiMoE that is supported, or is damaged.
        ExportError: the options do not fit, or the output cannot be written.
    """
    report = progress or (lambda phase, done, total: None)
    wanted = target_named(target)
    chooses = check_widths(quantize, bits, fit, text)
    named = MIXED if chooses else quantize
    output = Path(output) if output is not None else Path(f"{Path(source).resolve().name}-{target}-{named}")
    check_output(output, overwrite)
    tokens = tokens_to_read(calibrate is not False, calibration_tokens)
    if calibrate is not False:
        check_calibration(output)
    report("reading", 0, 0)
    folder = resolve(source, revision, token)
    config = read_config(folder)
    merged = None if adapter is None else read_adapter(Path(adapter))
    options: dict[str, Any] = {
        "task": task_for(config, task, source),
        "block_size": block_size,
        "kv_cache": kv_cache,
        "dtype": dtype,
        "store": store,
        "rounding": rounding,
        "calibrate": calibrate is not False,
    }
    if operators is None:
        operators, lacking = default_operators(config, wanted, INTEGERS if chooses else [quantize], **options)
        if lacking:
            logger.warning(NO_LIBRARY)
    options["operators"] = operators
    widths = Widths(config, wanted, options) if chooses else None
    recipe = recipe_for(config, wanted, quantize, **options) if widths is None else widths.smallest()
    check_tokens(config, folder)
    decoding = read_decoding(config, folder, recipe)
    check_text(folder)
    corpus = calibration = None
    if calibrate is not False:
        corpus = calibration_text(None if calibrate is True else Path(calibrate), folder, config, tokens)
        calibration = CalibrationFolder(output)
    fetch_weights(source, folder, token, report)
    stored = read_headers(folder)
    rows = parameters(config, stored, recipe.task, merged)
    if recipe.evens_gains:
        rows = even_gains(config, rows)
    sources = [*_shards(stored), *(merged.files if merged else ())]

    report("tracing", 0, 0)
    traced = trace(config, rows if calibration is None else calibration.rows(rows), DTYPES[recipe.dtype], recipe.task)
    if widths is not None:

        def size(recipe: Recipe) -> int:
            return _bundle_size(traced, source, folder, config, rows, recipe, decoding, merged, corpus)

        recipe = chosen_recipe(widths, bits, fit, text, rows, folder, size, report)
    if corpus is not None:
        recipe = dataclasses.replace(recipe, calibration=corpus.digest())
    graphs = build_graphs(traced, config, rows, recipe)
    with staged(output, overwrite) as staging:
        if corpus is not None and calibration is not None:
            calibration.begin(_plan(staging, (), recipe, sources))
            run_calibration(config, recipe, rows, corpus.windows, calibration, report)
            _name_rare_experts(calibration.facts())
        nbytes = write_graphs(graphs, staging, recipe, sources, report)
        _write_files(folder, staging, config, recipe)
        files = bundle.describe_files(staging, counter(report, "hashing", nbytes))
        manifest = _manifest(origin(source, folder, merged), folder, config, recipe, decoding, files, corpus)
        manifest.write(staging)
    if calibration is not None:
        calibration.remove()
    return output


def plan_widths(
    source: str | Path,
    bits: float | None,
    fit: int | None,
    text: str | None,
    adapter: str | Path | None,
    revision: str | None,
    token: str | None,
    widths: Widths,
    progress: Progress,
) -> Recipe:
    """The recipe that an export with these options has; the weights are read, and downloaded where it needs them.

    Raises:
        ConfigError, CheckpointError, ExportError: as for `export`.
    """
    folder, config = resolve(source, revision, token), widths.config
    merged = None if adapter is None else read_adapter(Path(adapter))
    fetch_weights(source, folder, token, progress)
    rows = parameters(config, read_headers(folder), "text-generation", merged)
    if widths.smallest().evens_gains:
        rows = even_gains(config, rows)
    decoding = read_decoding(config, folder, widths.smallest())

    @cache
    def traced() -> ir.Model:
        return trace(config, rows, DTYPES[widths.smallest().dtype], "text-generation")

    def size(recipe: Recipe) -> int:
        return _bundle_size(traced(), source, folder, config, rows, recipe, decoding, merged)

    return chosen_recipe(widths, bits, fit, text, rows, folder, size, progress)


def _bundle_size(
    traced: ir.Model,
    source: str | Path,
    folder: Path,
    config: PhiMoEConfig,
    rows: dict[str, tuple[Rows, ...]],
    recipe: Recipe,
    decoding: bundle.Decoding,
    merged: Adapter | None,
    corpus: CalibrationText | None = None,
) -> int:
    """Bytes of all files of the bundle by a recipe: all but the weights are written, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        staging, layout = Path(name), Layout()
        for file, graph in build_graphs(traced.clone(), config, rows, recipe).items():
            layout.save(graph, staging / file)
        _write_files(folder, staging, config, recipe)
        data = {file: bundle.File(size, "0" * 64) for file, size in layout.sizes.items()}
        files = bundle.describe_files(staging) | data
        _manifest(origin(source, folder, merged), folder, config, recipe, decoding, files, corpus).write(staging)
        return layout.nbytes + sum(path.stat().st_size for path in staging.iterdir())


def _name_rare_experts(facts: list[Facts]) -> None:
    """Logs which experts are rounded more for other tokens than for their own, of which there are few."""
    rare = [each for each in facts if each.shrinkage > 0.5]
    if rare:
        few = [f"layer {each.layer + 1} expert {each.expert + 1} ({each.tokens} tokens)" for each in rare[:5]]
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        logger.warning(
            "calibration: %d of %d experts got so few tokens of the text that they are rounded for all tokens' inputs "
            "rather than their own: %s%s",
            len(rare),
            len(facts),
            ", ".join(few),
            more,
        )


def build_graphs(
    traced: ir.Model, config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]], recipe: Recipe
) -> dict[str, ir.Model]:
    """The bundle's graphs by file; they have their weights in common, described and not yet computed."""
    shared = _lower(traced, config, rows, recipe)
    store_half = StoreHalf(recipe)
    graphs = {}
    for file, (experts, optional_inputs) in recipe.graphs().items():
        graph = shared.clone()  # of the functions, too, which are the same objects for all exports
        if recipe.dequantizes:  # DequantizeLinear reads blocks from opset 21 on; nothing else here changed until then
            graph.ir_version = 10
            for opsets in (graph.opset_imports, *(function.opset_imports for function in graph.functions.values())):
                opsets[""] = 21
        EXPERTS[experts](config, recipe)(graph)
        common.InlinePass()(graph)
        NameNodes()(graph)
        _clean(graph)
        if recipe.task == "text-generation" and not optional_inputs:
            RequireInputs()(graph)
        store_half(graph)
        graph.producer_name, graph.producer_version = "phimoe-onnx", __version__
        graphs[file] = graph
    return graphs


def _lower(model: ir.Model, config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]], recipe: Recipe) -> ir.Model:
    """The traced graph in the target's operators over stored weights, but for the experts."""
    target, layers, cached = recipe.target, config.num_hidden_layers, recipe.task == "text-generation"
    if target.attention == "GroupQueryAttention":
        FuseAttention(config, target.rotates(config), recipe.native_attention)(model)
    elif cached:
        ReshapeCache(config)(model)
    if target.skip_norm:
        FuseSkipLayerNorm(layers)(model)
    StoreExperts(layers, recipe)(model)
    if cached:
        AddOptionalInputs()(model)
    StoreProjections(recipe)(model)
    QuantizeEmbedding(recipe)(model)
    if recipe.kv_cache == "fp16":
        HalveCache(layers)(model)
    elif recipe.kv_cache != "none":
        QuantizeCache(config, rows, int(recipe.kv_cache[3:]))(model)
    return model


def _clean(model: ir.Model) -> None:
    """Folds small constants and drops what nothing reads."""
    optimizer.fold_constants(model, input_size_limit=1024, output_size_limit=1024)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.TopologicalSortPass()(model)
    common.ClearMetadataAndDocStringPass()(model)


def write_graphs(
    graphs: dict[str, ir.Model], staging: Path, recipe: Recipe, sources: Iterable[Path], report: Progress
) -> int:
    """Writes the graphs and their weights; returns the weights' bytes."""
    layout = Layout()
    for file, graph in graphs.items():
        layout.save(graph, staging / file)
    journal = Journal(staging, _plan(staging, graphs, recipe, sources), layout.sizes)
    try:
        _check_room(staging, layout.nbytes)
        write_weights(layout, staging, journal, counter(report, "writing weights", layout.nbytes))
    finally:
        journal.close()
    return layout.nbytes


def _shards(stored: dict[str, Stored]) -> list[Path]:
    return sorted({where.file for where in stored.values()})


def _plan(staging: Path, graphs: Iterable[str], recipe: Recipe, sources: Iterable[Path]) -> str:
    """A hash of the graphs, which say what lies where, of the recipe, which says how it is made, and of the sizes and
    times of the sources: the shards, and an adapter's files.
    """
    digest = hashlib.sha256(f"{__version__} {recipe.digest()}".encode())
    for file in graphs:
        digest.update((staging / file).read_bytes())
    for path in sources:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _check_room(folder: Path, nbytes: int) -> None:
    written = sum(_on_disk(path) for path in folder.glob("*.data"))  # by an earlier run
    free = shutil.disk_usage(folder).free
    if nbytes - written > free:
        raise ExportError(
            f"{folder.parent}: the weights need {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
        )


def _on_disk(path: Path) -> int:
    """Bytes that a file takes, which may be sparse; Windows does not say, and counts none of it."""
    blocks: int = getattr(path.stat(), "st_blocks", 0)
    return blocks * 512


def _write_files(folder: Path, staging: Path, config: PhiMoEConfig, recipe: Recipe) -> None:
    """The files beside graphs and weights: the checkpoint's configuration and tokenizer, and what other tools read."""
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    raw = read_json(staging / "config.json")
    if (known := for_transformers(raw)) != raw:
        (staging / "config.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for name, text in tokenizer_files(folder).items():
        (staging / name).write_text(text, encoding="utf-8")
    write_genai(folder, staging, config, recipe)
    if recipe.draws_on_device:
        ir.save(sampling_graph(), staging / bundle.SAMPLING)


def write_genai(folder: Path, staging: Path, config: PhiMoEConfig, recipe: Recipe) -> None:
    """Writes genai_config.json where onnxruntime-genai can run the bundle; `folder` has generation_config.json."""
    if recipe.task == "text-generation" and recipe.target.genai is not None and recipe.operators == "stock":
        genai = genai_config(config, read_generation(folder), "model.onnx", recipe.target)
        (staging / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")


def described(recipe: Recipe) -> tuple[bundle.Graph, ...]:
    """The manifest's `graphs`."""
    return tuple(
        bundle.Graph(
            file=file,
            devices=recipe.target.devices_for(recipe.dtype, experts),
            optional_inputs=bundle.OPTIONAL_INPUTS if optional_inputs else (),
            requires=recipe.requires,
        )
        for file, (experts, optional_inputs) in recipe.graphs().items()
    )


def _manifest(
    source: str,
    folder: Path,
    config: PhiMoEConfig,
    recipe: Recipe,
    decoding: bundle.Decoding,
    files: dict[str, bundle.File],
    corpus: CalibrationText | None,
) -> bundle.Manifest:
    return bundle.Manifest(
        tool_version=__version__,
        source=source,
        task=recipe.task,
        target=recipe.target.name,
        quantize=recipe.quantize,
        dtype=recipe.dtype,
        recipe=recipe.digest(),
        weights=recipe.stored_weights(),
        graphs=described(recipe),
        decoding=decoding,
        chat=chat_format(folder) if recipe.task == "text-generation" else None,
        classes=bundle.Classes(config.labels, config.function_to_apply)
        if recipe.task == "text-classification"
        else None,
        files=files,
        calibration=None if corpus is None else corpus.facts(),
    )
