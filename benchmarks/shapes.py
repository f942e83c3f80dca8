"""Checkpoints in the shapes of the family, as files that take no disk where they hold zeros."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(64)],
    "long_factor": [1.0 + 0.5 * i for i in range(64)],
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": 4096,
}
BASE = {
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "attention_bias": True,
    "lm_head_bias": True,
    "rms_norm_eps": 1e-5,
    "router_jitter_noise": 0.01,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 32000,
}
# Microsoft's config.json's, but for the rope factors, which are of the same size
SHAPES: dict[str, dict[str, Any]] = {
    "Phi-3.5-MoE": BASE | {"max_position_embeddings": 131072, "sliding_window": 131072, "rope_scaling": LONGROPE},
    "GRIN-MoE": BASE,
    "Phi-mini-MoE": BASE | {"intermediate_size": 960},
    "Phi-tiny-MoE": BASE | {"intermediate_size": 448, "num_attention_heads": 16, "num_key_value_heads": 4},
}
TOKENIZER = Path(__file__).parent.parent / "models/phimoe-austen"
POOL = 1 << 24  # numbers


def write_checkpoint(folder: Path, shape: str, layers: int, random_layers: int) -> int:
    """Writes a bf16 checkpoint, a shard a layer; returns how many parameters it has.

    Args:
        folder: a new folder.
        shape: a key of SHAPES.
        layers: how many layers, whatever the shape says.
        random_layers: so many are noise; the others are zeros, which take no disk.
    """
    return write_config(folder, SHAPES[shape] | {"num_hidden_layers": layers}, random_layers)


def write_config(folder: Path, config: dict[str, Any], random_layers: int) -> int:
    """The same for any config.json with all of `BASE`'s keys for sizes."""
    layers = config["num_hidden_layers"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    shards = [_layer(config, n) for n in range(layers)]
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shards[0]["model.embed_tokens.weight"] = (vocab, hidden)
    shards[-1] |= {
        "model.norm.weight": (hidden,),
        "model.norm.bias": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "lm_head.bias": (vocab,),
    }
    # every tensor is a stretch of one pool: to draw billions of numbers would take longer than to export them
    pool = _bfloat16(np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.02))
    random = np.random.default_rng(1)
    weight_map = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{layers:05d}.safetensors"
        _write_shard(folder / name, tensors, pool if number < random_layers else None, random)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(int(np.prod(shape)) for tensors in shards for shape in tensors.values())


def _layer(config: dict[str, Any], number: int) -> dict[str, tuple[int, ...]]:
    h, i = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    prefix = f"model.layers.{number}."
    tensors: dict[str, tuple[int, ...]] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors |= {f"{prefix}{norm}.weight": (h,), f"{prefix}{norm}.bias": (h,)}
    for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
        tensors |= {
            f"{prefix}self_attn.{name}_proj.weight": (rows, columns),
            f"{prefix}self_attn.{name}_proj.bias": (rows,),
        }
    tensors[f"{prefix}block_sparse_moe.gate.weight"] = (config["num_local_experts"], h)
    for expert in range(config["num_local_experts"]):
        for name, shape in (("w1", (i, h)), ("w2", (h, i)), ("w3", (i, h))):
            tensors[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return tensors


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, uint16; what does not fit is cut off."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], pool: np.ndarray | None, random: np.random.Generator
) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, shape in tensors.items() if pool is not None else ():
            file.seek(start + header[name]["data_offsets"][0])
            left = int(np.prod(shape))
            if name.endswith("norm.weight"):
                file.write(_bfloat16(np.ones(left, np.float32)).tobytes())
                continue
            while left:
                first = int(random.integers(POOL // 2))
                values = pool[first : first + min(left, POOL // 2)]
                file.write(values.tobytes())
                left -= len(values)
