"""Small random PhiMoE checkpoints of any shape, in any writer's spelling."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import save_file

from phimoe_onnx import bundle, modeling
from phimoe_onnx.config import PhiMoEConfig, parse_config

MODEL = Path(__file__).parent.parent / "models" / "phimoe-austen"

BASE: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "hidden_act": "silu",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2043,
    "torch_dtype": "float32",
}


def longrope(head_dim: int, original: int = 32) -> dict[str, Any]:
    """A rope_scaling whose two sets of factors and mscales differ visibly."""
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.02 * i for i in range(head_dim // 2)],
        "long_factor": [1.0 + 0.4 * i for i in range(head_dim // 2)],
        "short_mscale": 1.05,
        "long_mscale": 1.2,
        "original_max_position_embeddings": original,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "longrope": {"rope_scaling": longrope(16)},
    "window": {"sliding_window": 9},
    "head_dim": {"head_dim": 32},
    "no-bias": {"attention_bias": False, "lm_head_bias": False},
    "tied": {"tie_word_embeddings": True, "lm_head_bias": False},
    "experts": {"num_local_experts": 5, "num_hidden_layers": 3, "router_jitter_noise": 0.1},
    "heads": {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 96},
    "tiles": {"intermediate_size": 128, "rope_scaling": longrope(16)},  # QMoE on CUDA wants multiples of 64
    # with head_dim 64, for which CUDA has another attention kernel
    "tiles-xqa": {
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rope_scaling": longrope(64),
    },
    "longrope-window": {
        "intermediate_size": 128,
        "rope_scaling": longrope(16),
        "sliding_window": 20,
        "num_key_value_heads": 4,
    },
}

TASKS: dict[str, dict[str, Any]] = {
    "text-generation": {},
    "text-classification": {
        "architectures": ["PhimoeForSequenceClassification"],
        "id2label": {"0": "bad", "1": "fair", "2": "good"},
    },
    "feature-extraction": {"architectures": ["PhimoeModel"]},
}


def make_model(config: dict[str, Any], seed: int = 0) -> Any:
    """The PyTorch model of a config.json, with random weights large enough for its routing to vary."""
    torch.manual_seed(seed)
    parsed = parse_config(config)
    model = modeling.MODELS[parsed.task or "text-generation"](parsed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02 if name.endswith("bias") else 0.3 if "gate.weight" in name else 0.08)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def write_checkpoint(
    folder: Path,
    writer: str = "hub",
    shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Writes a random checkpoint into `folder`, with the small model's tokenizer.

    Args:
        folder: is made.
        writer: "hub" for per-expert tensors, "fused" for the in-memory names of transformers 5; the tensors of a base
            model have no prefix `model.` in either.
        shards: number of safetensors files; with more than one there is an index.
        seed: of the weights.
        dtype: of the stored tensors.
        config: what differs from `BASE`.
    """
    raw = BASE | config
    model = make_model(raw, seed)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if raw["tie_word_embeddings"] and name == "lm_head.weight":
            continue
        tensors.update(_spell(name, tensor, writer))
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "model." if raw["architectures"] == TASKS["feature-extraction"]["architectures"] else ""
    tensors = {name.removeprefix(prefix): tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for n in range(shards):
            file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: tensors[name] for name in names[n::shards]}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names[n::shards], file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    for file in MODEL.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


def _spell(name: str, tensor: torch.Tensor, writer: str) -> dict[str, torch.Tensor]:
    if writer == "fused":
        name = name.replace("block_sparse_moe.gate", "mlp.router").replace("block_sparse_moe", "mlp")
        return {name: tensor}
    if name.endswith("gate_up_proj"):
        prefix = name.removesuffix("gate_up_proj")
        gates_and_ups = [expert.chunk(2) for expert in tensor]
        return {
            f"{prefix}{e}.{w}.weight": t
            for e, pair in enumerate(gates_and_ups)
            for w, t in zip(("w1", "w3"), pair, strict=True)
        }
    if name.endswith("down_proj"):
        prefix = name.removesuffix("down_proj")
        return {f"{prefix}{e}.w2.weight": expert for e, expert in enumerate(tensor)}
    return {name: tensor}


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Token ids without special ones."""
    return [int(token) for token in np.random.default_rng((seed, length)).integers(3, 2000, length)]


def assert_close(logits: Any, expected: Any) -> None:
    """Holds float32 logits to the bounds for exact graphs: 1e-4 of the standard deviation on average, 1e-3 at worst."""
    difference = np.abs(np.asarray(logits) - np.asarray(expected)) / np.asarray(expected).std()
    assert difference.shape == np.asarray(expected).shape
    assert difference.mean() <= 1e-4
    assert difference.max() <= 1e-3


def open_graph(path: Path, optimize: bool = True) -> ort.InferenceSession:
    """A session on the CPU with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(
    config: PhiMoEConfig, rows: Sequence[Sequence[int]], past: Sequence[Any] = (), **optional: int
) -> dict[str, Any]:
    """A graph's inputs for rows of any lengths, padded on the right, after `past`, the cache in graph order."""
    cached = past[0].shape[2] if past else 0
    longest = max(map(len, rows))
    ids = np.array([[*row, *[0] * (longest - len(row))] for row in rows], np.int64)
    mask = np.array([[1] * (cached + len(row)) + [0] * (longest - len(row)) for row in rows], np.int64)
    nothing = np.zeros((len(rows), config.num_key_value_heads, 0, config.head_dim), np.float32)
    names = bundle.cache_names(config.num_hidden_layers, "past_key_values")
    cache = dict(zip(names, past or [nothing] * len(names), strict=True))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **cache,
        **{name: np.array([value]) for name, value in optional.items()},
    }


def at_level_0(source: Path, folder: Path, graph: str) -> Path:
    """A copy of a bundle with one of its graphs, whose accuracy_level is 0: activations are not rounded to int8."""
    shutil.copytree(source, folder)
    model = ir.load(folder / graph)
    changed = 0
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
            changed += 1
    assert changed
    ir.save(model, folder / graph)
    manifest = bundle.read_manifest(folder)
    graphs = tuple(each for each in manifest.graphs if each.file == graph)
    dataclasses.replace(manifest, graphs=graphs, files=bundle.describe_files(folder)).write(folder)
    return folder
