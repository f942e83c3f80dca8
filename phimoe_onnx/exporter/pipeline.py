"""export(): checkpoint -> bundle, the steps in order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from phimoe_onnx import bundle
from phimoe_onnx._version import __version__
from phimoe_onnx.checkpoint.source import COPIED, fetch_weights, origin, resolve
from phimoe_onnx.checkpoint.tensors import Stored, parameters, read_headers
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.formats import DTYPES, activation_dtype, check_names, format_for, task_for
from phimoe_onnx.exporter.manifest.chat_format import chat_format
from phimoe_onnx.exporter.manifest.decoding import read_decoding, read_generation
from phimoe_onnx.exporter.manifest.genai import genai_config
from phimoe_onnx.exporter.passes.attention import FuseAttention
from phimoe_onnx.exporter.passes.branches import BranchExperts
from phimoe_onnx.exporter.passes.cache import ReshapeCache
from phimoe_onnx.exporter.passes.embedding import QuantizeEmbedding
from phimoe_onnx.exporter.passes.half import StoreHalf
from phimoe_onnx.exporter.passes.logits import AddOptionalInputs, RequireInputs
from phimoe_onnx.exporter.passes.moe import FuseExperts
from phimoe_onnx.exporter.passes.names import NameNodes
from phimoe_onnx.exporter.passes.norms import FuseSkipLayerNorm
from phimoe_onnx.exporter.passes.projections import StoreProjections
from phimoe_onnx.exporter.passes.quantized_cache import QuantizeCache
from phimoe_onnx.exporter.quantize.rtn import Format
from phimoe_onnx.exporter.sampling import sampling_graph
from phimoe_onnx.exporter.staging import Journal, check_output, staged
from phimoe_onnx.exporter.tokenizer import check_text, tokenizer_files
from phimoe_onnx.exporter.trace import trace
from phimoe_onnx.exporter.write import Layout, write_weights
from phimoe_onnx.progress import Progress, counter


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
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes the bundle of the PhiMoE checkpoint `source`.

    Args:
        source: a local folder or a hub id.
        output: the bundle's folder; by default `<name>-<target>-<quantize>` in the working directory.
        task: "text-generation", "text-classification" (`PhimoeForSequenceClassification`) or "feature-extraction" (any
            PhiMoE, its head left out); by default the one that config.json's architectures name.
        quantize: "none" (float32 for the CPU, float16 for CUDA), "fp16" (weights stored as float16), "int8" or "int4"
            (experts, attention and lm_head block-wise in that width, embeddings int8, router float32).
        target: "cpu", "cuda", or "portable" for standard ONNX operators only.
        block_size: how many neighbours of a row share a scale; by default the largest number up to 64 that fits the
            shape.
        kv_cache: "none" (the dtype of the activations), "int8" or "int4": how keys and values are cached.
        dtype: of the activations, on CUDA "float16" (the default) or "bfloat16"; the other targets have "float32" only.
        revision: branch, tag or commit, for a hub id; `token` likewise.
        overwrite: replace an existing bundle; otherwise an existing output is an error.
        progress: called with a phase, the bytes done and the bytes to do.

    Returns:
        The bundle's folder, which appears only when it is complete.

    Raises:
        ConfigError, CheckpointError: the source is no PhiMoE that is supported, or is damaged.
        ExportError: the options do not fit, or the output cannot be written.
    """
    report = progress or (lambda phase, done, total: None)
    check_names(target, quantize, kv_cache, task)
    report("reading", 0, 0)
    folder = resolve(source, revision, token)
    config = read_config(folder)
    task = task_for(config, task, source, kv_cache)
    output = Path(output) if output is not None else Path(f"{Path(source).resolve().name}-{target}-{quantize}")
    check_output(output, overwrite)
    activations = activation_dtype(target, dtype)
    format = format_for(config, target, quantize, block_size, dtype)
    decoding = read_decoding(config, folder, target, kv_cache, DTYPE_NAMES[activations])
    check_text(folder)
    fetch_weights(source, folder, token, report)
    stored = read_headers(folder)
    rows = parameters(config, stored, task)

    report("tracing", 0, 0)
    model = trace(config, rows, activations, task)
    _fuse(model, config, task, target, format)
    if kv_cache != "none":
        QuantizeCache(config, rows, int(kv_cache[3:]))(model)
    models = {"model.onnx": model}
    if target != "cuda":
        branched = model if format is None else model.clone()
        BranchExperts(config.num_hidden_layers, format)(branched)
        _clean(branched)
        if target == "cpu" and task == "text-generation":
            models["model.branches.onnx"] = branched if format else branched.clone()
            RequireInputs()(models["model.branches.onnx"])
        elif target == "cpu" and format:
            models["model.branches.onnx"] = branched
    store_half = StoreHalf()
    for graph in models.values():
        if quantize == "fp16" and activations == ir.DataType.FLOAT:
            store_half(graph)
        graph.producer_name, graph.producer_version = "phimoe-onnx", __version__

    with staged(output, overwrite) as staging:
        layout = Layout()
        for file, graph in models.items():
            layout.save(graph, staging / file)
        journal = Journal(staging, _plan(staging, models, stored))
        _check_room(staging, layout.nbytes)
        try:
            write_weights(layout, staging, journal, counter(report, "writing weights", layout.nbytes))
        finally:
            journal.close()
        _copy(folder, staging)
        if task == "text-generation" and target != "portable":
            genai = genai_config(config, read_generation(folder), "model.onnx", target)
            (staging / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")
        if task == "text-generation" and target == "cuda":
            ir.save(sampling_graph(), staging / bundle.SAMPLING)
            decoding = dataclasses.replace(decoding, sampling_graph=bundle.SAMPLING)
        bundle.Manifest(
            tool_version=__version__,
            source=origin(source, folder),
            task=task,
            target=target,
            quantize=quantize,
            dtype=DTYPE_NAMES[activations],
            weights=_weights(config, task, quantize, DTYPE_NAMES[activations], format),
            graphs=tuple(
                _describe_graph(file, graph, target, DTYPE_NAMES[activations]) for file, graph in models.items()
            ),
            decoding=decoding,
            files=bundle.describe_files(staging, counter(report, "hashing", layout.nbytes)),
            chat=chat_format(folder) if task == "text-generation" else None,
            classes=bundle.Classes(config.labels, config.function_to_apply) if task == "text-classification" else None,
        ).write(staging)
    return output


DTYPE_NAMES: dict[ir.DataType, Any] = {dtype: name for known in DTYPES.values() for name, dtype in known.items()}

# The least ONNX Runtime release on which a graph loads and is right: QMoE knows accuracy_level, without which it is
# slow, from 1.31 on. MoE on the CPU is wrong before 1.32 (it writes its output over its input), so only CUDA's graphs
# have it. Theirs need 1.31, too: before, GroupQueryAttention does not rotate at positions beyond the cache's length,
# where the long factors are.
MINIMUM_ONNXRUNTIME = {"QMoE": "1.31", "MoE": "1.31"}
OTHERWISE = "1.29"


def _describe_graph(file: str, model: ir.Model, target: str, dtype: str) -> bundle.Graph:
    minimum = next(
        (MINIMUM_ONNXRUNTIME[node.op_type] for node in model.graph if node.op_type in MINIMUM_ONNXRUNTIME), OTHERWISE
    )
    devices = {"cpu": minimum, "cuda": minimum} if target == "portable" else {target: minimum}
    if target == "cuda" and dtype == "float16":
        devices["cpu"] = "1.32"  # the release whose float16 MoE on the CPU is right
    optional = tuple(name for name in bundle.OPTIONAL_INPUTS if name in model.graph.initializers)
    return bundle.Graph(file, devices, optional)


def _fuse(model: ir.Model, config: PhiMoEConfig, task: str, target: str, format: Format | None) -> None:
    """The traced graph in ONNX Runtime's own operators; for the portable target only the experts and what stays
    standard.
    """
    layers = config.num_hidden_layers
    if target != "portable":
        FuseAttention(config, target)(model)
        FuseSkipLayerNorm(layers)(model)
    elif task == "text-generation":
        ReshapeCache(config)(model)
    FuseExperts(layers, format)(model)
    if task == "text-generation":
        AddOptionalInputs()(model)
    formats = {} if format is None else dict.fromkeys(("qkv_proj", "o_proj", "lm_head", "embed_tokens"), format)
    StoreProjections(formats)(model)
    if format is not None:
        QuantizeEmbedding(Format(8, format.block_size, format.dtype))(model)
    common.InlinePass()(model)
    NameNodes()(model)
    _clean(model)


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


def _plan(staging: Path, models: Iterable[str], stored: dict[str, Stored]) -> str:
    """A hash of the graphs, which say what lies where and how it was made, and of the shards' sizes and times."""
    digest = hashlib.sha256(__version__.encode())
    for file in models:
        digest.update((staging / file).read_bytes())
    for shard in sorted({where.file for where in stored.values()}):
        status = shard.stat()
        digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _check_room(folder: Path, nbytes: int) -> None:
    written = sum(
        path.stat().st_blocks * 512 for path in folder.glob("*.data")
    )  # by an earlier run; the files may be sparse
    free = shutil.disk_usage(folder).free
    if nbytes - written > free:
        raise ExportError(
            f"{folder.parent}: the weights need {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
        )


def _copy(source: Path, staging: Path) -> None:
    """Copies the configuration and tokenizer files that exist."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    for name, text in tokenizer_files(source).items():
        (staging / name).write_text(text, encoding="utf-8")


def _weights(
    config: PhiMoEConfig, task: str, quantize: str, dtype: str, format: Format | None
) -> tuple[bundle.StoredWeights, ...]:
    stored = "float16" if quantize == "fp16" and dtype == "float32" else dtype
    layers = (0, config.num_hidden_layers - 1)

    def group(form: Format | str, layers: tuple[int, int] | None, *names: str) -> bundle.StoredWeights:
        if isinstance(form, str):
            return bundle.StoredWeights(names, layers, form)
        return bundle.StoredWeights(names, layers, f"int{form.bits}", form.block_size, dtype)

    moe = "block_sparse_moe."
    matrices = (
        f"{moe}experts.gate_up_proj",
        f"{moe}experts.down_proj",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    )
    head = {"text-generation": ("lm_head.weight",)}.get(task, ())
    return (
        group(format or stored, layers, *matrices),
        group("float32", layers, f"{moe}gate.weight"),
        group(Format(8, format.block_size) if format else stored, None, "model.embed_tokens.weight"),
        *(group(format or stored, None, name) for name in head),
    )
