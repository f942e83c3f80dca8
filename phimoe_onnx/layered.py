"""PhiMoE layer by layer and expert by expert, over all texts at once: modeling.py's numbers, and never a whole model in
memory.

A weight is read when its turn comes and forgotten after it; an expert that no token chose is not read. Each text keeps
its own passes through each operator, with the shapes that it has in a whole model, so its numbers are the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phimoe_onnx import modeling
from phimoe_onnx.checkpoint.data import read_rows
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.checkpoint.tensors import TIED
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.scratch import Scratch

CHUNK = 2048  # tokens of a text whose attention is computed at once; the mask has so many rows

# A parameter of modeling.py by its name, float32; of a stack of experts the matrix of the one with the number.
Read = Callable[[str, int | None], Tensor]
Routing = list[Tensor]  # the chosen experts, int64 [1, S, 2], of each layer in order
Attention = Callable[..., tuple[Tensor, Tensor, Tensor]]


def checkpoint_weights(config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]]) -> Read:
    """The parameters of a checkpoint, whose rows `checkpoint.tensors.parameters` gives."""

    def read(name: str, expert: int | None) -> Tensor:
        if config.tie_word_embeddings and name == TIED[1]:
            name = TIED[0]
        parts = rows[name]
        if expert is not None:
            each = len(parts) // config.num_local_experts
            parts = parts[expert * each : (expert + 1) * each]
        return read_rows(parts)

    return read


@dataclass(frozen=True)
class Text:
    """What to run: its tokens, and the experts to take in place of those that the router chooses, if any."""

    token_ids: Sequence[int]
    routing: Routing | None = None


@dataclass(frozen=True)
class Ran:
    """What became of a text: the normalised hidden states [1, S, H], and the experts that were chosen."""

    hidden: Tensor
    routing: Routing


@torch.inference_mode()
def run(
    config: PhiMoEConfig,
    read: Read,
    texts: Sequence[Text],
    *,
    attention: Callable[[int], Attention] = lambda layer: modeling.attention,
    scratch: Scratch | None = None,
    step: Callable[[str], None] = lambda where: None,
) -> list[Ran]:
    """Runs whole texts, before which nothing is cached, each as if alone.

    Args:
        config: the model's shape.
        read: its weights.
        texts: what to run; a text longer than `CHUNK` attends in pieces, which may sum in another order.
        attention: what each layer attends with, by its number; as `modeling.attention`.
        scratch: where the hidden states of the texts lie, three arrays [S, H] a text.
        step: called before the attention of each layer and before each expert, with words that say where it is;
            `steps` times in all.
    """
    scratch = scratch or Scratch()
    rope = modeling.Rope(config)
    embeddings = read("model.embed_tokens.weight", None)
    states = [State(text, embeddings, scratch) for text in texts]
    del embeddings
    for number in range(config.num_hidden_layers):
        where = f"layer {number + 1} of {config.num_hidden_layers}"
        step(f"{where}, attention")
        layer = read_layer(config, read, number, attention(number))
        for state in states:
            state.attend(layer, config, rope)
        prefix = f"model.layers.{number}.block_sparse_moe.experts."
        for expert in range(config.num_local_experts):
            step(f"{where}, expert {expert + 1} of {config.num_local_experts}")
            choosing = [state for state in states if (state.routing[-1] == expert).any()]
            if choosing:
                gate_up, down = read(f"{prefix}gate_up_proj", expert), read(f"{prefix}down_proj", expert)
            for state in choosing:
                modeling.add_expert(state.output, state.normed, state.weights, state.routing[-1], expert, gate_up, down)
        for state in states:
            state.x += state.output
    norm = partial(
        F.layer_norm,
        normalized_shape=(config.hidden_size,),
        weight=read("model.norm.weight", None),
        bias=read("model.norm.bias", None),
        eps=config.rms_norm_eps,
    )
    for state in states:
        state.x.copy_(norm(state.x))
    return [Ran(state.x, state.routing) for state in states]


def steps(config: PhiMoEConfig) -> int:
    """How many steps `run` counts."""
    return config.num_hidden_layers * (1 + config.num_local_experts)


def head(config: PhiMoEConfig, task: str, read: Read) -> Callable[[Tensor], Tensor]:
    """What makes outputs of hidden states [1, S, H].

    For text-generation logits [S, V]; a classifier's logits [1, labels] or the hidden state [1, H] of the last token.
    """
    if task == "feature-extraction":
        return lambda hidden: hidden[:, -1]
    if task == "text-classification":
        score = read("score.weight", None)
        return lambda hidden: F.linear(hidden[:, -1], score)
    weight = read("lm_head.weight", None)
    bias = read("lm_head.bias", None) if config.lm_head_bias else None
    return lambda hidden: F.linear(hidden, weight, bias)[0]


def agreement(routing: Routing, other: Routing) -> float:
    """The share of tokens and layers whose two experts are the same."""
    same = [(one == two).all(dim=-1).float().mean() for one, two in zip(routing, other, strict=True)]
    return float(torch.stack(same).mean(dtype=torch.float64))


def read_layer(
    config: PhiMoEConfig, read: Read, number: int, attention: Attention = modeling.attention
) -> modeling.DecoderLayer:
    """A layer with all its weights but the experts'."""
    with torch.device("meta"):
        layer = modeling.DecoderLayer(config, modeling.Seams(attention=attention))
    names = [name for name, _ in layer.named_parameters() if ".experts." not in name]
    weights: dict[str, Any] = {name: read(f"model.layers.{number}.{name}", None) for name in names}
    layer.load_state_dict(weights, strict=False, assign=True)
    return layer


class State:
    """Where a text is.

    Attributes:
        x: the hidden states [1, S, H].
        normed: what the experts of a layer are given, of the same shape.
        output: the sum of what they give.
        weights: of each token's two experts, [1, S, 2].
        routing: of the layers so far, the last being this one's.
    """

    def __init__(self, text: Text, embeddings: Tensor, scratch: Scratch) -> None:
        shape = (1, len(text.token_ids), embeddings.shape[1])
        self.x, self.normed, self.output = (torch.from_numpy(scratch.empty(*shape)) for _ in range(3))
        self.x.copy_(F.embedding(torch.tensor([text.token_ids]), embeddings))
        self.replay = text.routing
        self.weights = torch.empty(0)
        self.routing: Routing = []

    def copy(self) -> State:
        """Another text that is where this one is."""
        other = copy.copy(self)
        other.x, other.normed, other.output = self.x.clone(), torch.empty_like(self.x), torch.empty_like(self.x)
        other.routing = list(self.routing)
        return other

    def attend(self, layer: modeling.DecoderLayer, config: PhiMoEConfig, rope: modeling.Rope) -> None:
        """Takes the text through the layer's attention, norms and router."""
        length = self.x.shape[1]
        past: modeling.KeyValue = (torch.empty(1, config.num_key_value_heads, 0, config.head_dim),) * 2
        for start in range(0, length, CHUNK):
            chunk = self.x[:, start : start + CHUNK]
            mask = torch.ones(1, start + chunk.shape[1], dtype=torch.int64)
            place = modeling.places(config, rope, chunk.shape[1], mask, torch.tensor([length]))
            attended, past = layer.attend(chunk, *place[:2], past, place[2])
            chunk.copy_(attended)
        self.normed.copy_(layer.post_attention_layernorm(self.x))
        self.output.zero_()
        moe = layer.block_sparse_moe
        if self.replay is None:
            self.weights, chosen = moe.route(self.normed)
        else:
            chosen = self.replay[len(self.routing)]
            self.weights = modeling.mixer_weights(moe.gate(self.normed), chosen, moe.jitter)
        self.routing.append(chosen)
