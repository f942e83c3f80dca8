"""A bundle small enough to build in a test, with the exact answer in numpy: two attention layers with longrope and no
experts.

Its graph keeps the whole contract of bundle.py for both kinds of target; its tokenizer is Phi's in small (byte
fallback, special tokens that eat the white space after them, byte tokens marked as special).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from phimoe_onnx.bundle import OPTIONAL_INPUTS, Graph, Manifest, cache_names, describe_files
from phimoe_onnx.config import LongRope, PhiMoEConfig, parse_config
from phimoe_onnx.exporter.manifest.decoding import read_decoding
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import target_named

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 2, 1, 16, 16
CONTEXT, BOUNDARY = 96, 24
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!"]
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("s", "t"), ("o", "p"), ("st", "op")]
    tokens = [
        *SPECIAL[:3],
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *(a + b for a, b in merges),
        *SPECIAL[3:],
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_too = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=t in SPECIAL[4:]) for t in [*SPECIAL, *bytes_too]]
    )
    return tokenizer


def config_json(vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "phimoe",
        "architectures": ["PhiMoEForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": BOUNDARY,
        "rope_theta": 100.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * (HEAD_DIM // 2),
            "long_factor": [4.0] * (HEAD_DIM // 2),
            "short_mscale": 1.0,
            "long_mscale": 1.3,
        },
        "eos_token_id": vocab_size - 5,
    }


class ToyModel:
    """The weights, the graph over them, and the same computation in numpy."""

    def __init__(self, config: PhiMoEConfig, seed: int = 0) -> None:
        self.config = config
        random = np.random.default_rng(seed)

        def weight(*shape: int) -> np.ndarray[Any, Any]:
            return random.normal(size=shape).astype(np.float32)

        self.embedding = weight(config.vocab_size, HIDDEN)
        self.qkv = [weight(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM) / 4 for _ in range(LAYERS)]
        self.out = [weight(HEADS * HEAD_DIM, HIDDEN) / 2 for _ in range(LAYERS)]
        self.head = weight(HIDDEN, config.vocab_size)
        rope = config.longrope
        assert isinstance(rope, LongRope)
        base = config.rope_theta ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = [
            np.arange(CONTEXT)[:, None] / (np.array(factor) * base) for factor in (rope.short_factor, rope.long_factor)
        ]
        scale = np.array([rope.short_mscale, rope.long_mscale])[:, None, None]
        self.cos = (np.cos(angles) * scale).astype(np.float32)  # [short or long, CONTEXT, HEAD_DIM / 2]
        self.sin = (np.sin(angles) * scale).astype(np.float32)

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """The logits after each token of one forward pass, [n, vocab_size]."""
        n = len(ids)
        cos, sin = (table[int(n > BOUNDARY)][:n, None] for table in (self.cos, self.sin))
        x = self.embedding[ids]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            heads = (x @ qkv).reshape(n, -1, HEAD_DIM)
            first, second = np.split(heads[:, : HEADS + KV_HEADS], 2, axis=-1)
            rotated = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
            query, key, value = rotated[:, :HEADS], rotated[:, HEADS:], heads[:, HEADS + KV_HEADS :]
            scores = np.einsum("qhd,kd->hqk", query, key[:, 0]) / np.sqrt(HEAD_DIM)
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum("hqk,kd->qhd", weights, value[:, 0]).reshape(n, -1) @ out
        return np.asarray(x @ self.head)

    def greedy(self, prompt: list[int], count: int, eos: frozenset[int] = frozenset()) -> list[int]:
        """What greedy generation gives, each token from a forward pass over everything before it."""
        ids = list(prompt)
        while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] not in eos):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def graph(self, target: str) -> onnx.ModelProto:
        """The graph for a target; positions are each row's own, long factors lie below the short ones in the rope
        table.
        """
        g = _Graph()
        mask, tokens = "attention_mask", "input_ids"
        length = g.op("Max", g.op("ReduceSum", mask, g.ints([1]), keepdims=1), "rope_length")  # [B, 1]
        long = g.op("Cast", g.op("Greater", length, g.ints([BOUNDARY])), to=TensorProto.INT64)
        sequence = g.op("Shape", tokens, start=1, end=2)
        total = g.op("Shape", mask, start=1, end=2)
        zero, one = g.scalar(0), g.scalar(1)
        steps = g.op("Range", zero, g.op("Squeeze", sequence), one)
        own = g.op("ReduceSum", mask, g.ints([1]), keepdims=1)
        positions = g.op("Add", g.op("Sub", own, sequence), steps)  # [B, S]
        rope_rows = g.op("Add", positions, g.op("Mul", long, g.ints([CONTEXT])))
        cos, sin = (g.weight(table.reshape(-1, HEAD_DIM // 2)) for table in (self.cos, self.sin))
        x = g.op("Gather", g.weight(self.embedding), tokens)
        past, present = (cache_names(LAYERS, prefix) for prefix in ("past_key_values", "present"))
        for layer in range(LAYERS):
            cache = past[2 * layer], past[2 * layer + 1], present[2 * layer], present[2 * layer + 1]
            qkv = g.op("MatMul", x, g.weight(self.qkv[layer]))
            if target == "portable":
                y = self._standard_attention(g, qkv, rope_rows, cos, sin, total, cache)
            else:
                lengths = g.op(
                    "Cast", g.op("Sub", g.op("Squeeze", own, g.ints([1])), g.ints([1])), to=TensorProto.INT32
                )
                width = g.op("Cast", g.op("Squeeze", total), to=TensorProto.INT32)
                inputs = [qkv, "", "", cache[0], cache[1], lengths, width, cos, sin, rope_rows]
                y = g.multi(
                    "GroupQueryAttention",
                    inputs,
                    [g.name(), cache[2], cache[3]],
                    domain="com.microsoft",
                    num_heads=HEADS,
                    kv_num_heads=KV_HEADS,
                    do_rotary=1,
                )
            x = g.op("Add", x, g.op("MatMul", y, g.weight(self.out[layer])))
        none = g.op("Equal", "logits_to_keep", g.ints([0]))
        start = g.op("Where", none, g.ints([0]), g.op("Sub", sequence, "logits_to_keep"))
        x = g.op("Slice", x, start, sequence, g.ints([1]))
        g.multi("MatMul", [x, g.weight(self.head)], ["logits"])
        return g.model(self.config.vocab_size, past, present)

    @staticmethod
    def _standard_attention(
        g: _Graph, qkv: str, rope_rows: str, cos: str, sin: str, total: str, cache: tuple[str, ...]
    ) -> str:
        heads = g.op("Transpose", g.op("Reshape", qkv, g.ints([0, 0, -1, HEAD_DIM])), perm=[0, 2, 1, 3])
        turned, value = g.split(heads, [HEADS + KV_HEADS, KV_HEADS], axis=1)
        first, second = g.split(turned, [HEAD_DIM // 2] * 2, axis=3)
        c, s = (g.op("Unsqueeze", g.op("Gather", table, rope_rows), g.ints([1])) for table in (cos, sin))
        left = g.op("Sub", g.op("Mul", first, c), g.op("Mul", second, s))
        right = g.op("Add", g.op("Mul", second, c), g.op("Mul", first, s))
        query, key = g.split(g.op("Concat", left, right, axis=3), [HEADS, KV_HEADS], axis=1)
        g.multi("Concat", [cache[0], key], [cache[2]], axis=2)
        g.multi("Concat", [cache[1], value], [cache[3]], axis=2)
        scores = g.op("MatMul", query, g.op("Transpose", cache[2], perm=[0, 1, 3, 2]))
        scores = g.op("Mul", scores, g.weight(np.array(HEAD_DIM**-0.5, np.float32)))
        keys = g.op("Range", g.scalar(0), g.op("Squeeze", total), g.scalar(1))
        base = g.op("Mod", rope_rows, g.ints([CONTEXT]))
        visible = g.op("LessOrEqual", keys, g.op("Unsqueeze", base, g.ints([1, 3])))
        scores = g.op("Where", visible, scores, g.weight(np.array(-1e30, np.float32)))
        y = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=3), cache[3]), perm=[0, 2, 1, 3])
        return g.op("Reshape", y, g.ints([0, 0, -1]))


class _Graph:
    """Nodes and initializers as they are named; an operator returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.multi(kind, list(inputs), [self.name()], **attributes)

    def multi(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def split(self, value: str, sizes: list[int], axis: int) -> list[str]:
        outputs = [self.name() for _ in sizes]
        self.multi("Split", [value, self.ints(sizes)], outputs, axis=axis)
        return outputs

    def weight(self, array: np.ndarray[Any, Any]) -> str:
        self.initializers.append(numpy_helper.from_array(array, self.name()))
        return self.initializers[-1].name

    def ints(self, values: list[int]) -> str:
        return self.weight(np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        return self.weight(np.array(value, np.int64))

    def model(self, vocab_size: int, past: list[str], present: list[str]) -> onnx.ModelProto:
        def info(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, shape)

        float32, int64 = TensorProto.FLOAT, TensorProto.INT64
        optional = ("logits_to_keep", "rope_length")
        inputs = [
            info("input_ids", int64, "batch", "sequence"),
            info("attention_mask", int64, "batch", "total"),
            *(info(name, float32, "batch", KV_HEADS, "past", HEAD_DIM) for name in past),
            *(info(name, int64, 1) for name in optional),
        ]
        outputs = [info("logits", float32, "batch", "kept", vocab_size)]
        outputs += [info(name, float32, "batch", KV_HEADS, "length", HEAD_DIM) for name in present]
        defaults = [numpy_helper.from_array(np.zeros(1, np.int64), name) for name in optional]
        graph = helper.make_graph(self.nodes, "toy", inputs, outputs, [*self.initializers, *defaults])
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10)


def write_bundle(folder: Path, target: str = "cpu", *, minimum_onnxruntime: str = "1.20", **files: str) -> ToyModel:
    """Writes the toy as a bundle; `files` replaces the text of files by their name up to the dot."""
    tokenizer = make_tokenizer()
    config = config_json(tokenizer.get_vocab_size())
    model = ToyModel(parse_config(config))
    folder.mkdir(parents=True)
    onnx.save(model.graph(target), folder / "model.onnx")
    eos = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|end|>")]
    texts = {
        "config": json.dumps(config),
        "generation_config": json.dumps({"eos_token_id": eos}),
        "tokenizer": tokenizer.to_str(),
        "tokenizer_config": json.dumps(
            {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "<|end|>"}}
        ),
    }
    for name, text in (texts | files).items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    devices = ("cpu", "cuda") if target == "portable" else (target,)
    Manifest(
        tool_version="0",
        source="toy",
        task="text-generation",
        target=target,
        quantize="none",
        dtype="float32",
        weights=(),
        graphs=(Graph("model.onnx", dict.fromkeys(devices, minimum_onnxruntime), OPTIONAL_INPUTS),),
        decoding=read_decoding(model.config, folder, recipe_for(model.config, target_named(target))),
        files=describe_files(folder),
    ).write(folder)
    return model
