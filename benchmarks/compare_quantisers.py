"""Times our quantiser and llama.cpp's side by side: the same matrices, the same cores, in turns, as a Markdown table.

Run it from the repository's root in an environment that has both:

    pip install llama-cpp-python gguf     # compiles llama.cpp for this machine, about ten minutes
    python -m benchmarks.compare_quantisers [--layers 4] [--rounds 3]

Without the two it times ours alone. It writes a random bf16 checkpoint of Phi-mini-MoE's shape cut to a few layers, and
the same weights as GGUF files in every input format that llama.cpp's quantiser reads. Everything is read from the page
cache; everything is written to the same folder. The last table is what rounding to 4 bits loses of a random matrix.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from phimoe_onnx import operators
from phimoe_onnx._version import __version__
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.exporter import pipeline
from phimoe_onnx.exporter.quantize import two_level_native
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.rtn import round_to_nearest
from phimoe_onnx.exporter.quantize.strips import Strips
from phimoe_onnx.exporter.quantize.two_level import round_two_level
from phimoe_onnx.exporter.recipe import RoundRows
from phimoe_onnx.exporter.weights import tensor_bytes
from tests.checkpoints import write_checkpoint

try:
    import gguf
    import llama_cpp
except ModuleNotFoundError:
    gguf = llama_cpp = None

Times = NDArray[np.float64]  # seconds, and seconds of all cores together

BLOCK = 32
GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FORMS: dict[str, Format | Strips] = {
    "int4 in strips": Strips(4),
    "int4, block 32": Format(4, BLOCK),
    "int8 in strips": Strips(8),
}


def main() -> None:
    """Prepares, measures in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=4, metavar="N", help="of the checkpoint: 4 (default) are 1.2 B parameters"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each candidate (default: 3)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write, some 18 GB; what is there already is used again"
    )
    parser.add_argument(
        "--bare",
        action="store_true",
        help="only what runs in memory, over 63 M random weights, and the table of losses",
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    if arguments.bare:
        matrices, candidates = [torch.randn(16, 960, 4096).bfloat16()], {}
    else:
        matrices, candidates = on_disk(folder, arguments.layers)
    count = sum(matrix.numel() for matrix in matrices)
    candidates |= {
        "ours, bare, bf16 in memory": partial(bare, matrices, round_to_nearest, Format(4, BLOCK)),
        "PyTorch, bare, bf16 in memory": partial(bare_torch, matrices),
    }
    for name, layout in FORMS.items():
        candidates[f"two-level to {name}, bare, bf16 in memory"] = partial(bare, matrices, round_two_level, layout)
    candidates["the same to int4 in strips without the library"] = partial(without_library, matrices[:1])
    counts = {name: matrices[0].numel() for name in candidates if "without the library" in name}
    times: dict[str, list[Times]] = {name: [] for name in candidates}
    for _ in range(arguments.rounds):
        for name, run in candidates.items():
            times[name].append(run())
    print(
        f"{datetime.date.today()}, {_cpu()}, {os.cpu_count()} cores, {count / 1e9:.2f} B parameters, "
        f"{arguments.rounds} rounds; ",
        end="",
    )
    peer = "no llama-cpp-python" if llama_cpp is None else f"llama-cpp-python {llama_cpp.__version__}"
    print(f"phimoe-onnx {__version__}, kernels {operators.kernels()}, PyTorch {torch.__version__}, {peer}")
    print(
        "\n| candidate | M parameters/s, median | best | worst | CPU seconds, least |\n| --- | --- | --- | --- | --- |"
    )
    for name, runs in times.items():
        seconds = [wall for wall, _ in runs]
        speeds = (counts.get(name, count) / value / 1e6 for value in (median(seconds), min(seconds), max(seconds)))
        print(
            f"| {name} | " + " | ".join(f"{speed:.0f}" for speed in speeds) + f" | {min(cpu for _, cpu in runs):.2f} |"
        )
    print_losses()
    if not arguments.folder:
        shutil.rmtree(folder)


def on_disk(folder: Path, layers: int) -> tuple[list[torch.Tensor], dict[str, Callable[[], Times]]]:
    """The matrices of a checkpoint, and the candidates that read files."""
    checkpoint = prepare(folder / "checkpoint", layers)
    config = read_config(checkpoint)
    tensors = read_tensors(checkpoint, config)
    candidates: dict[str, Callable[[], Times]] = {}
    for dtype, form in GGML_TYPES.items() if llama_cpp is not None else ():
        source = write_gguf(folder / f"{form}.gguf", config, tensors, dtype)
        candidates[f"llama.cpp, {form} GGUF to Q4_0 GGUF"] = partial(llama, source, folder / "Q4_0.gguf")
    stock, native = {"block_size": BLOCK, "rounding": "rtn"}, {"operators": "native"}
    written, bundle = ("writing weights", "hashing"), folder / "bundle"
    candidates |= {
        "ours, bf16 safetensors to int4, block 32": partial(ours, checkpoint, bundle, written, stock),
        "the same with tracing and hashing": partial(ours, checkpoint, bundle, ("start", "end"), stock),
        "ours, bf16 safetensors to int4 in strips, two-level": partial(ours, checkpoint, bundle, written, native),
    }
    return [tensor for name, tensor in tensors.items() if is_quantised(name)], candidates


def prepare(folder: Path, layers: int) -> Path:
    """A random checkpoint of Phi-mini-MoE's shape."""
    if not folder.exists():
        shape = {
            "hidden_size": 4096,
            "intermediate_size": 960,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32064,
        }
        write_checkpoint(folder, shards=layers, dtype=torch.bfloat16, **shape)
    return folder


def read_tensors(checkpoint: Path, config: PhiMoEConfig) -> dict[str, torch.Tensor]:
    """The model under llama.cpp's names, each layer's experts stacked, bf16."""
    parts = {name: [part.read() for part in rows] for name, rows in rows_of(checkpoint, config).items()}
    return {name: torch.stack(read) if is_stack(name) else read[0] for name, read in parts.items()}


def rows_of(checkpoint: Path, config: PhiMoEConfig) -> dict[str, tuple[Rows, ...]]:
    """The checkpoint's rows under llama.cpp's names; of a stack of experts each expert's matrix."""
    rows = parameters(config, read_headers(checkpoint))
    found = {"token_embd.weight": rows["model.embed_tokens.weight"], "output.weight": rows["lm_head.weight"]}
    found |= {f"output_norm.{kind}": rows[f"model.norm.{kind}"] for kind in ("weight", "bias")}
    found["output.bias"] = rows["lm_head.bias"]
    for n in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{n}.", f"blk.{n}."
        for kind in ("weight", "bias"):
            for part in ("q", "k", "v"):
                found[f"{theirs}attn_{part}.{kind}"] = rows[f"{ours}self_attn.{part}_proj.{kind}"]
            found[f"{theirs}attn_output.{kind}"] = rows[f"{ours}self_attn.o_proj.{kind}"]
            found[f"{theirs}attn_norm.{kind}"] = rows[f"{ours}input_layernorm.{kind}"]
            found[f"{theirs}ffn_norm.{kind}"] = rows[f"{ours}post_attention_layernorm.{kind}"]
        moe = f"{ours}block_sparse_moe."
        found[f"{theirs}ffn_gate_inp.weight"] = rows[f"{moe}gate.weight"]
        found[f"{theirs}ffn_gate_exps.weight"] = rows[f"{moe}experts.gate_up_proj"][0::2]
        found[f"{theirs}ffn_up_exps.weight"] = rows[f"{moe}experts.gate_up_proj"][1::2]
        found[f"{theirs}ffn_down_exps.weight"] = rows[f"{moe}experts.down_proj"]
    return found


def write_gguf(path: Path, config: PhiMoEConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
    """The tensors as a GGUF file, matrices in `dtype`, a tensor in memory at a time."""
    if path.exists():
        return path
    kept = {name: dtype if is_quantised(name) else torch.float32 for name in tensors}
    shapes = {name: (tuple(tensor.shape), GGML_TYPES[kept[name]]) for name, tensor in tensors.items()}
    writer = begin_gguf(path, config, shapes)
    for name, tensor in tensors.items():
        writer.write_tensor_data(tensor_bytes(tensor.to(kept[name])))
    writer.close()
    return path


def begin_gguf(path: Path, config: PhiMoEConfig, tensors: dict[str, tuple[tuple[int, ...], str]]) -> Any:
    """gguf's writer of a file whose metadata is written: each tensor has a shape and one of ggml's types, and all
    are to be written in that order.
    """
    writer = gguf.GGUFWriter(path, "phimoe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")  # it is given token ids
    for name, (shape, form) in tensors.items():
        kind = gguf.GGMLQuantizationType[form]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def is_stack(name: str) -> bool:
    """Whether llama.cpp's tensor is a matrix of each expert."""
    return "_exps." in name


def is_quantised(name: str) -> bool:
    """Whether both tools quantise the tensor: every matrix but the routers."""
    return name.endswith(".weight") and "norm" not in name and "ffn_gate_inp" not in name


def llama(source: Path, target: Path) -> Times:
    """llama.cpp's quantiser, a file to a file, every matrix to Q4_0."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype, options.pure = os.cpu_count(), llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    start = _now()
    failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(options))
    times = _now() - start
    if failed:
        raise SystemExit(f"llama.cpp could not quantise {source}")
    target.unlink()
    return times


def ours(checkpoint: Path, output: Path, between: tuple[str, str], options: dict[str, Any]) -> Times:
    """An int4 export, from the beginning of one of its phases to that of another."""
    begins = {"start": _now()}
    pipeline.export(
        checkpoint,
        output,
        quantize="int4",
        **options,
        progress=lambda phase, *_: begins.setdefault(phase, _now()),
    )
    begins["end"] = _now()
    shutil.rmtree(output)
    return begins[between[1]] - begins[between[0]]


def bare(matrices: list[torch.Tensor], round_rows: RoundRows, form: Format | Strips) -> Times:
    """A rounding alone, a matrix a worker, a worker a core, as the export does it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = _now()
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        parts = [part for matrix in matrices for part in matrix.view(-1, *matrix.shape[-2:])]
        for _ in workers.map(lambda part: round_rows(part, form, "", None), parts):
            pass
    times = _now() - start
    torch.set_num_threads(threads)
    return times


def without_library(matrices: list[torch.Tensor]) -> Times:
    """Two-level rounding as where the native library is not built."""
    found = two_level_native.function
    two_level_native.function = lambda: None
    times = bare(
        [part for matrix in matrices for part in matrix.tensor_split(os.cpu_count() or 1)], round_two_level, Strips(4)
    )
    two_level_native.function = found
    return times


def print_losses() -> None:
    """A table of squared errors, relative to the weights' squares."""
    generator = np.random.default_rng(0)
    shape = (2048, 4096)
    samples = {"normal": generator.standard_normal(shape), "Student t, 5": generator.standard_t(5, shape)}
    print("\n| squared error x 1000 | " + " | ".join(samples) + " |\n| --- | --- | --- |")
    for name, round_rows, form in (
        ("two-level, 4.2 bits a weight", round_two_level, Strips(4)),
        ("rtn, block 32, 5 bits", round_to_nearest, Format(4, BLOCK)),
        ("rtn, block 64, 4.5 bits", round_to_nearest, Format(4, 64)),
    ):
        errors = []
        for sample in samples.values():
            rows = torch.from_numpy(sample).float()
            stored = round_rows(rows, form, "", None)
            back = form.unpack(stored[0], *shape) if isinstance(form, Strips) else form.dequantize(*stored)
            errors.append(1000 * float((back - rows).square().mean() / rows.square().mean()))
        print(f"| {name} | " + " | ".join(f"{error:.2f}" for error in errors) + " |")


def bare_torch(matrices: list[torch.Tensor]) -> Times:
    """Round to nearest as one would write it in PyTorch: a matrix at a time, PyTorch's own threads."""
    start = _now()
    for matrix in matrices:
        blocks = matrix.float().unflatten(-1, (-1, BLOCK))
        scales = blocks.abs().amax(dim=-1, keepdim=True) / 7
        codes = (blocks / scales).round().clamp(-8, 7).add(8).to(torch.uint8).flatten(-2)
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return _now() - start


def _now() -> Times:
    """Seconds on the clock, and seconds of all cores."""
    return np.array((time.perf_counter(), time.process_time()))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
