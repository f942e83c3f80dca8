"""PhiMoE in plain PyTorch: what the exporter traces, and the reference that a bundle is held against.

Dimensions: B batch, S new tokens, P cached tokens, T = P + S, H hidden_size, N num_attention_heads, K
num_key_value_heads, D head_dim, E num_local_experts, I intermediate_size, V vocab_size. Everything but the router is
computed in the dtype of the weights.

The three functions `attention`, `sparse_mixer` and `experts` are the seams: a model takes others in their place, so
that tracing keeps each as one node of the graph, and routing can be recorded or replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phimoe_onnx.config import PhiMoEConfig

KeyValue = tuple[Tensor, Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention with rope over cached and new keys.

    Args:
        query: [B, S, N * D]; `key` and `value`: [B, S, K * D], all before rope.
        cos: [B, S, D / 2], like `sin`: the rotation of the new positions.
        past_key: [B, K, P, D], rotated, like `past_value`.
        visible: bool [B, 1, S, T], true where a query may look.

    Returns:
        The heads' outputs [B, S, N * D], the present keys and the present values [B, K, T, D].
    """
    head_dim = past_key.shape[-1]
    query, key, value = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    present_key = torch.cat((past_key, key), dim=2)
    present_value = torch.cat((past_value, value), dim=2)
    output = F.scaled_dot_product_attention(
        query,
        present_key,
        present_value,
        # the least finite number, not -inf: a padded query that sees nothing must not become NaN
        attn_mask=torch.where(visible, 0.0, torch.finfo(query.dtype).min).to(query.dtype),
        enable_gqa=True,
    )
    return output.transpose(1, 2).flatten(2), present_key, present_value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope on x [B, heads, S, D] in the half-split form, RoFormer (arXiv 2104.09864) section 3.4.2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def sparse_mixer(scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """SparseMixer routing at inference, GRIN-MoE (arXiv 2409.12136): two experts, each weighed against its near rivals.

    Args:
        scores: router logits [..., E].
        jitter: `router_jitter_noise`; a rival counts while it is within 2 * jitter of the best, relative to the larger.

    Returns:
        The experts' weights [..., 2], each in (0, 1] and not renormalised, and their indices int64 [..., 2].
    """
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :2]  # of equal scores the lower index first
    return mixer_weights(scores, chosen, jitter), chosen


def mixer_weights(scores: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """The weights of two given experts: each one's softmax over itself and its near rivals, the second without the
    first.

    Shapes as in `sparse_mixer`.
    """
    best = scores.gather(-1, chosen)[..., None]
    scores = scores[..., None, :]  # [..., 1, E] against [..., 2, 1]: both rounds at once
    gap = scores - best
    far = gap / torch.maximum(scores.abs(), best) < -2 * jitter
    first = F.one_hot(chosen[..., :1], scores.shape[-1]).bool()
    taken = torch.cat((torch.zeros_like(first), first), dim=-2)  # the second round cannot choose the first expert again
    return gap.exp().masked_fill(far | taken, 0.0).sum(dim=-1).reciprocal()


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' outputs w2(silu(w1 x) * w3 x); experts that no token chose are not
    computed.

    Args:
        x: [B, S, H].
        weights: [B, S, 2], like the int64 indices `chosen`.
        gate_up_proj: [E, 2 * I, H], w1 above w3.
        down_proj: [E, H, I], w2.

    Returns:
        [B, S, H].
    """
    output = x.new_zeros(x.shape)
    for expert in chosen.unique().tolist():
        add_expert(output, x, weights, chosen, expert, gate_up_proj[expert], down_proj[expert])
    return output


def add_expert(
    output: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, expert: int, gate_up_proj: Tensor, down_proj: Tensor
) -> None:
    """Adds what one expert gives the tokens that chose it to `output`, in place.

    Shapes as in `experts`, which begins with zeros and adds one after the other; the expert's own matrices are
    [2 * I, H] and [H, I].
    """
    tokens, weights, chosen = x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1)
    token, slot = (chosen == expert).nonzero(as_tuple=True)
    gate, up = F.linear(tokens[token], gate_up_proj).chunk(2, dim=-1)
    y = F.linear(F.silu(gate) * up, down_proj)
    output.view_as(tokens).index_add_(0, token, y * weights[token, slot, None].to(y.dtype))


@dataclass(frozen=True)
class Seams:
    """What a model computes attention, routing and experts with; each has the signature of the function of its name."""

    attention: Callable[..., tuple[Tensor, Tensor, Tensor]] = attention
    sparse_mixer: Callable[[Tensor, float], tuple[Tensor, Tensor]] = sparse_mixer
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = experts


EXACT = Seams()


class Attention(nn.Module):
    def __init__(self, config: PhiMoEConfig, seams: Seams) -> None:
        super().__init__()
        self.seams = seams
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue, visible: Tensor) -> tuple[Tensor, KeyValue]:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        output, present_key, present_value = self.seams.attention(query, key, value, cos, sin, *past, visible)
        return self.o_proj(output), (present_key, present_value)


class Experts(nn.Module):
    def __init__(self, config: PhiMoEConfig) -> None:
        super().__init__()
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))


class SparseMoE(nn.Module):
    def __init__(self, config: PhiMoEConfig, seams: Seams) -> None:
        super().__init__()
        self.seams = seams
        self.jitter = config.router_jitter_noise
        # float32 whatever the model's dtype: a rounded score can flip the choice
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False, dtype=torch.float32)
        self.experts = Experts(config)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of each token's two experts and their indices, as `sparse_mixer` gives them."""
        return self.seams.sparse_mixer(self.gate(x.float()), self.jitter)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        return self.seams.experts(x, weights, chosen, self.experts.gate_up_proj, self.experts.down_proj)


class DecoderLayer(nn.Module):
    def __init__(self, config: PhiMoEConfig, seams: Seams) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, seams)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.block_sparse_moe = SparseMoE(config, seams)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue, visible: Tensor) -> tuple[Tensor, KeyValue]:
        """The first half of the layer: what goes to the experts, before the norm."""
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, past, visible)
        return x + attended, present

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue, visible: Tensor) -> tuple[Tensor, KeyValue]:
        x, present = self.attend(x, cos, sin, past, visible)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x)), present


class Rope(nn.Module):
    """cos and sin for the positions of each row, with the row's own choice of longrope factors."""

    def __init__(self, config: PhiMoEConfig) -> None:
        super().__init__()
        self.short_inv_freq: Tensor
        self.long_inv_freq: Tensor
        self.longrope = config.longrope
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        base = config.rope_theta**exponent
        short = base.new_tensor(config.longrope.short_factor) if config.longrope else torch.ones_like(base)
        long = base.new_tensor(config.longrope.long_factor) if config.longrope else torch.ones_like(base)
        self.register_buffer("short_inv_freq", 1.0 / (short * base), persistent=False)
        self.register_buffer("long_inv_freq", 1.0 / (long * base), persistent=False)

    def forward(self, positions: Tensor, length: Tensor) -> KeyValue:
        """positions int64 [B, S] and each row's whole length int64 [B, 1] -> cos and sin, float32 [B, S, D / 2]."""
        angles, mscale = self.angles(positions, length)
        return angles.cos() * mscale, angles.sin() * mscale

    def angles(self, positions: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """The angles, float32 [B, S, D / 2], and what their cos and sin are multiplied by, [] or [B, 1, 1]."""
        inv_freq, mscale = self.short_inv_freq, torch.ones(())
        if self.longrope:
            long = (length > self.longrope.original_max_position_embeddings).unsqueeze(2)
            inv_freq = torch.where(long, self.long_inv_freq, self.short_inv_freq)
            mscale = torch.where(long, self.longrope.long_mscale, self.longrope.short_mscale)
        return positions.unsqueeze(2).float() * inv_freq, mscale


def places(
    config: PhiMoEConfig, rope: Rope, sequence: int, attention_mask: Tensor, rope_length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention must know of the last `sequence` slots S of a mask int64 [B, T]: cos and sin, float32 [B, S, D /
    2], and bool [B, 1, S, T], true where a query may look.

    `rope_length` is as in `PhiMoEForCausalLM.forward`.
    """
    slot_position = attention_mask.cumsum(dim=1) - 1  # positions count real tokens, not padding
    positions = slot_position[:, -sequence:].clamp(min=0)
    length = torch.maximum(attention_mask.sum(dim=1, keepdim=True), rope_length)
    cos, sin = rope(positions, length)
    slot = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    visible = (attention_mask.unsqueeze(1) > 0) & (slot <= slot[-sequence:].unsqueeze(1))
    if config.window is not None:
        visible = visible & (positions.unsqueeze(2) - slot_position.unsqueeze(1) < config.window)
    return cos, sin, visible.unsqueeze(1)


class PhiMoEModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, config: PhiMoEConfig, seams: Seams = EXACT) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = Rope(config)
        self.layers = nn.ModuleList(DecoderLayer(config, seams) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def empty_cache(self, batch: int = 1) -> list[KeyValue]:
        """A cache that holds nothing: per layer, keys and values [batch, K, 0, D]."""
        nothing = self.embed_tokens.weight.new_empty(batch, self.config.num_key_value_heads, 0, self.config.head_dim)
        return [(nothing, nothing)] * self.config.num_hidden_layers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, rope_length: Tensor, past_key_values: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """See `PhiMoEForCausalLM.forward`; returns the normalised hidden states [B, S, H] and the present cache."""
        cos, sin, visible = places(self.config, self.rope, input_ids.shape[1], attention_mask, rope_length)
        x = self.embed_tokens(input_ids)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        presents = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            x, present = layer(x, cos, sin, past, visible)
            presents.append(present)
        return self.norm(x), presents

    def whole(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The normalised hidden states [B, S, H] of whole texts, before which nothing is cached."""
        rope_length = torch.zeros(1, dtype=torch.int64, device=input_ids.device)
        hidden: Tensor = self(input_ids, attention_mask, rope_length, self.empty_cache(input_ids.shape[0]))[0]
        return hidden


class PhiMoEForCausalLM(nn.Module):
    """The decoder with its language-model head; parameters carry the hub's names, an expert stack those of transformers
    5.
    """

    def __init__(self, config: PhiMoEConfig, seams: Seams = EXACT) -> None:
        super().__init__()
        self.config = config
        self.seams = seams
        self.model = PhiMoEModel(config, seams)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def empty_cache(self, batch: int = 1) -> list[KeyValue]:
        """As `PhiMoEModel.empty_cache`."""
        return self.model.empty_cache(batch)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, rope_length: Tensor, past_key_values: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """One pass over new tokens.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, T], 1 for a real token and 0 for padding.
            rope_length: int64 [1]; a row uses the long rope factors once the larger of its length and this passes the
                boundary, so that the first chunk of a long prompt can be told how long the prompt will be.
            past_key_values: per layer, keys and values [B, K, P, D].

        Returns:
            Logits float32 [B, S, V] and per layer the present keys and values [B, K, T, D].
        """
        hidden, presents = self.model(input_ids, attention_mask, rope_length, past_key_values)
        return self.lm_head(hidden).float(), presents


class PhiMoEForFeatureExtraction(nn.Module):
    """The decoder over whole texts, without a cache and without a head; parameters are named as in the others."""

    def __init__(self, config: PhiMoEConfig, seams: Seams = EXACT) -> None:
        super().__init__()
        self.config = config
        self.seams = seams
        self.model = PhiMoEModel(config, seams)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids int64 [B, S] and attention_mask int64 [B, S], 1 for a real token -> hidden states, float32 [B, S,
        H].
        """
        return self.model.whole(input_ids, attention_mask).float()


class PhiMoEForSequenceClassification(nn.Module):
    """The decoder over whole texts, without a cache, with a head on each row's last real token."""

    def __init__(self, config: PhiMoEConfig, seams: Seams = EXACT) -> None:
        super().__init__()
        self.config = config
        self.seams = seams
        self.model = PhiMoEModel(config, seams)
        # float32 whatever the model's dtype, like the router: it is small, and what it gives is the answer
        self.score = nn.Linear(config.hidden_size, len(config.labels), bias=False, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids int64 [B, S] and attention_mask int64 [B, S], 1 for a real token -> logits float32 [B, labels]."""
        hidden = self.model.whole(input_ids, attention_mask)
        slot = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (slot * attention_mask).amax(dim=1).view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
        logits: Tensor = self.score(hidden.gather(1, last).squeeze(1).float())
        return logits


Model = PhiMoEForCausalLM | PhiMoEForSequenceClassification | PhiMoEForFeatureExtraction
MODELS: dict[str, type[Model]] = {
    "text-generation": PhiMoEForCausalLM,
    "text-classification": PhiMoEForSequenceClassification,
    "feature-extraction": PhiMoEForFeatureExtraction,
}

AnyModel = TypeVar("AnyModel", bound=Model)


def with_seams(model: AnyModel, seams: Seams) -> AnyModel:
    """The same model over the very same parameters, with other seams."""
    with torch.device("meta"):
        other = type(model)(model.config, seams)
    other.load_state_dict(model.state_dict(), assign=True)
    if isinstance(other, PhiMoEForCausalLM) and _is_tied(model):  # one parameter, not two alike
        other.lm_head.weight = other.model.embed_tokens.weight
    other.model.rope = model.model.rope  # its buffers are in no state_dict
    other.train(model.training)
    return other


def _is_tied(model: Model) -> bool:
    return isinstance(model, PhiMoEForCausalLM) and model.lm_head.weight is model.model.embed_tokens.weight
