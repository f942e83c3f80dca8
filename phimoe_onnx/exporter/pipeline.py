"""export(): checkpoint -> bundle, the steps in order."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from phimoe_onnx import bundle
from phimoe_onnx._version import __version__
from phimoe_onnx.config import PhiMoEConfig, read_config, read_json
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.chat_format import chat_format
from phimoe_onnx.exporter.checkpoint import Stored, parameters, read_headers
from phimoe_onnx.exporter.genai import genai_config
from phimoe_onnx.exporter.passes import attention
from phimoe_onnx.exporter.passes.attention import FuseAttention
from phimoe_onnx.exporter.passes.branches import BranchExperts
from phimoe_onnx.exporter.passes.cache import ReshapeCache
from phimoe_onnx.exporter.passes.embedding import QuantizeEmbedding
from phimoe_onnx.exporter.passes.half import StoreHalf
from phimoe_onnx.exporter.passes.logits import AddOptionalInputs
from phimoe_onnx.exporter.passes.moe import FuseExperts
from phimoe_onnx.exporter.passes.norms import FuseSkipLayerNorm
from phimoe_onnx.exporter.passes.projections import StoreProjections
from phimoe_onnx.exporter.quantize.rtn import Format
from phimoe_onnx.exporter.source import resolve
from phimoe_onnx.exporter.staging import Journal, check_output, staged
from phimoe_onnx.exporter.trace import trace
from phimoe_onnx.exporter.write import Layout, write_weights

TARGETS = ("cpu", "cuda", "portable")
QUANTIZE = ("none", "fp16", "int8", "int4")
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
BLOCK_SIZES = (16, 32, 64, 128, 256)

Progress = Callable[[str, int, int], None]


def export(
    source: str | Path,
    output: str | Path | None = None,
    *,
    quantize: str = "none",
    target: str = "cpu",
    block_size: int = 32,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes the bundle of the PhiMoE checkpoint `source`.

    Args:
        source: a local folder or a hub id.
        output: the bundle's folder; by default `<name>-<target>-<quantize>` in the working directory.
        quantize: "none" (float32 for the CPU, float16 for CUDA), "fp16" (weights stored as float16), "int8" or "int4"
            (experts, attention and lm_head block-wise in that width, embeddings int8, router float32).
        target: "cpu", "cuda", or "portable" for standard ONNX operators only.
        block_size: how many neighbours of a row share a scale.
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
    if target not in TARGETS:
        raise ExportError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if quantize not in QUANTIZE:
        raise ExportError(f"quantize is {quantize!r}, expected one of {', '.join(QUANTIZE)}")
    folder = resolve(source, revision, token)
    config = read_config(folder)
    output = Path(output) if output is not None else Path(f"{folder.resolve().name}-{target}-{quantize}")
    check_output(output, overwrite)
    _check_shape(config, target, quantize, block_size)
    stored = read_headers(folder)
    rows = parameters(config, stored)

    report("tracing", 0, 0)
    dtype = ir.DataType.FLOAT16 if target == "cuda" else ir.DataType.FLOAT
    format = Format(int(quantize[3:]), block_size, dtype) if quantize.startswith("int") else None
    model = trace(config, rows, dtype)
    _fuse(model, config, target, format)
    models = {"model.onnx": model}
    if target != "cuda":
        branched = model if format is None else model.clone()
        BranchExperts(config.num_hidden_layers, format)(branched)
        _clean(branched)
        models.setdefault("model.branches.onnx" if format else "model.onnx", branched)
    store_half = StoreHalf()
    for graph in models.values():
        if quantize == "fp16" and dtype == ir.DataType.FLOAT:
            store_half(graph)
        graph.producer_name, graph.producer_version = "phimoe-onnx", __version__

    with staged(output) as staging:
        layout = Layout()
        for file, graph in models.items():
            layout.save(graph, staging / file)
        journal = Journal(staging, _plan(staging, models, stored))
        _check_room(staging, layout.nbytes)
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report("writing weights", done, layout.nbytes)

        try:
            write_weights(layout, staging, journal, advance)
        finally:
            journal.close()
        generation = _copy(folder, staging)
        if target != "portable":
            genai = genai_config(config, generation, "model.onnx", target)
            (staging / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")
        report("hashing", 0, 0)
        bundle.Manifest(
            tool_version=__version__,
            source=str(source) if not Path(source).exists() else folder.resolve().name,
            task="text-generation",
            target=target,
            quantize=quantize,
            dtype="float16" if dtype == ir.DataType.FLOAT16 else "float32",
            weights=_describe(quantize, target, format),
            graphs=tuple(bundle.Graph(file, _minimum_onnxruntime(graph)) for file, graph in models.items()),
            files=bundle.describe_files(staging),
            chat=chat_format(folder),
        ).write(staging)
    return output


# The least ONNX Runtime release on which a graph loads and is right: QMoE knows accuracy_level, without which it is slow, from
# 1.31 on. MoE on the CPU is wrong before 1.32 (it writes its output over its input), so only CUDA's graphs have it.
MINIMUM_ONNXRUNTIME = {"QMoE": "1.31"}
OTHERWISE = "1.29"


def _minimum_onnxruntime(model: ir.Model) -> str:
    return next((MINIMUM_ONNXRUNTIME[node.op_type] for node in model.graph if node.op_type in MINIMUM_ONNXRUNTIME), OTHERWISE)


def _fuse(model: ir.Model, config: PhiMoEConfig, target: str, format: Format | None) -> None:
    """The traced graph in ONNX Runtime's own operators; for the portable target only the experts and what stays standard."""
    layers = config.num_hidden_layers
    if target == "portable":
        ReshapeCache(config)(model)
    else:
        FuseAttention(config)(model)
        FuseSkipLayerNorm(layers)(model)
    FuseExperts(layers, format)(model)
    AddOptionalInputs()(model)
    formats = {} if format is None else dict.fromkeys(("qkv_proj", "o_proj", "lm_head", "embed_tokens"), format)
    StoreProjections(formats)(model)
    if format is not None:
        QuantizeEmbedding(Format(8, format.block_size, format.dtype))(model)
    common.InlinePass()(model)
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


def _check_shape(config: PhiMoEConfig, target: str, quantize: str, block_size: int) -> None:
    """Raises ExportError for what the target or the quantiser does not take, before any work is done."""
    if target == "portable" and quantize.startswith("int"):
        raise ExportError(
            f"--target portable has no {quantize}: the standard operators it is made of know no block-wise weights; use none or fp16"
        )
    if target != "portable":
        attention.check(config)
    if not quantize.startswith("int"):
        return
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
    }
    fitting = [size for size in BLOCK_SIZES if not any(width % size for width in widths.values())]
    if block_size not in fitting:
        shapes = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ExportError(f"--block-size is {block_size}, but it must divide {shapes}; choose from {fitting or 'none: use fp16'}")


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
    written = sum(path.stat().st_blocks * 512 for path in folder.glob("*.data"))  # by an earlier run; the files may be sparse
    free = shutil.disk_usage(folder).free
    if nbytes - written > free:
        raise ExportError(f"{folder.parent}: the weights need {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free")


def _copy(source: Path, staging: Path) -> dict[str, Any]:
    """Copies the configuration and tokenizer files that exist; returns generation_config.json."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    return read_json(source / "generation_config.json") if (source / "generation_config.json").is_file() else {}


def _describe(quantize: str, target: str, format: Format | None) -> dict[str, str]:
    if format is not None:
        kinds = dict.fromkeys(("experts", "attention", "lm_head"), str(format))
        return kinds | {"embeddings": str(Format(8, format.block_size)), "router": "float32", "norms": "float32"}
    stored = "float16" if target == "cuda" or quantize == "fp16" else "float32"
    return dict.fromkeys(("experts", "attention", "lm_head", "embeddings"), stored) | {"router": "float32"}
