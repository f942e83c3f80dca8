"""What each width of each kind of matrix costs: the KL divergence from the float model, on a short text.

To try every layer, kind and width by itself would take as many passes through the model as there are such things. So

1. the layers are split into a few spans. For each span, kind and width one stream of hidden states goes through the
   model with just these matrices rounded; at the end its divergence is measured. Its tokens keep the experts that they
   chose in the float model. A token that goes to another expert is far off at once, whichever matrix was the last
   straw: few such tokens would decide, and what they cost does not add up.
2. In each layer each kind and width is also tried by itself on the float model's hidden states. The relative error of
   what then leaves the layer says how the span's divergence divides among its layers.
3. One stream a width has all matrices but the head rounded, and its tokens choose their own experts. The costs of that
   width are scaled so that their sum is its divergence: so they count what other experts do.
4. The head comes last, and each of its widths is measured by itself.

All streams go through a layer together: each weight is read once, and rounded once for each width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phimoe_onnx import modeling
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.places import HEAD_KIND, KINDS, Place
from phimoe_onnx.exporter.quantize.format import Plain
from phimoe_onnx.exporter.quantize.strips import Strips
from phimoe_onnx.exporter.recipe import EMBEDDING, HEAD, Recipe
from phimoe_onnx.layered import Read, State, Text, head, read_layer
from phimoe_onnx.scratch import Scratch

SPANS = 4
DIGITS = 3  # of a cost: what is behind them changes with the order of sums


@torch.inference_mode()
def measure(
    config: PhiMoEConfig,
    read: Read,
    recipes: Mapping[int, Recipe],
    windows: Sequence[Sequence[int]],
    *,
    spans: int = SPANS,
    step: Callable[[], None] = lambda: None,
) -> dict[Place, dict[int, float]]:
    """The cost of each place at each width, in nats a token.

    Args:
        config: the model's shape.
        read: the checkpoint's weights.
        recipes: by width, one that stores all places so. They are rounded as their operators' own rounding does.
        windows: token ids; each is a text of its own.
        spans: how many the layers are split into.
        step: called `steps` times.
    """
    rounder = _Rounder(read, recipes)
    widths = sorted(recipes)
    embeddings = read(EMBEDDING, None)
    exact = _Stream([State(Text(ids), embeddings, Scratch()) for ids in windows])
    everywhere = range(config.num_hidden_layers)
    tried = [(kind, bits) for kind in KINDS for bits in widths]
    together = [exact.rounded(tuple(KINDS), bits, everywhere) for bits in widths]
    streams: list[_Stream] = []
    errors: dict[Place, dict[int, float]] = {}
    ends = _ends(config.num_hidden_layers, spans)
    for number in everywhere:
        if number in (0, *ends):
            last = next(end for end in ends if end > number)
            streams += [exact.rounded((kind,), bits, range(number, last), held=True) for kind, bits in tried]
        alone = [exact.rounded((kind,), bits, range(number, number + 1), held=True) for kind, bits in tried]
        _through_layer(config, rounder, number, [exact, *together, *streams, *alone], step)
        for stream in alone:
            errors.setdefault(Place(stream.kinds[0], number), {})[stream.bits] = stream.error(exact)
    divergences = _divergences(config, rounder, exact, [*together, *streams])
    of_all, of_spans = divergences[: len(together)], divergences[len(together) :]
    costs: dict[Place, dict[int, float]] = {}
    for stream, divergence in zip(streams, of_spans, strict=True):
        own = [Place(stream.kinds[0], layer) for layer in stream.layers]
        total = sum(errors[place][stream.bits] for place in own)
        for place in own:
            share = errors[place][stream.bits] / total if total else 1 / len(own)
            costs.setdefault(place, {})[stream.bits] = divergence * share
    for stream, divergence in zip(together, of_all, strict=True):
        total = sum(known[stream.bits] for known in costs.values())
        for known in costs.values():
            known[stream.bits] *= divergence / total if total else 0.0
    costs[Place(HEAD_KIND, config.num_hidden_layers)] = dict(_head_divergences(config, rounder, exact, widths))
    step()
    return {
        place: {bits: float(f"{cost:.{DIGITS}g}") for bits, cost in known.items()} for place, known in costs.items()
    }


def steps(config: PhiMoEConfig) -> int:
    """How many steps `measure` counts."""
    return config.num_hidden_layers * (1 + config.num_local_experts) + 1


def memory(config: PhiMoEConfig, widths: int, tokens: int) -> int:
    """Bytes of the states that `measure` holds at once, by arithmetic, for so many widths and tokens."""
    streams = 1 + len(KINDS) * (min(SPANS, config.num_hidden_layers) + 1)
    return (1 + widths * streams) * 3 * 4 * tokens * config.hidden_size


@dataclass
class _Stream:
    """The texts' states in a model with some kinds rounded to `bits` in `layers`, or in the float model."""

    states: list[State]
    kinds: tuple[str, ...] = ()
    bits: int = 0
    layers: range = range(0)

    def rounded(self, kinds: tuple[str, ...], bits: int, layers: range, *, held: bool = False) -> _Stream:
        """Another one, that is where this one is, and `held` to the experts that this one chooses before it."""
        states = [state.copy() for state in self.states]
        for state, other in zip(self.states, states, strict=True):
            other.replay = state.routing if held else None
        return _Stream(states, kinds, bits, layers)

    def width(self, kind: str, layer: int) -> int | None:
        """The bits that a kind has in a layer; None: it is not rounded."""
        return self.bits if kind in self.kinds and layer in self.layers else None

    def error(self, exact: _Stream) -> float:
        """Its states' squared distance from the exact ones', relative to their square."""
        pairs = list(zip(self.states, exact.states, strict=True))
        distance = sum(float((ours.x - theirs.x).double().square().sum()) for ours, theirs in pairs)
        return distance / sum(float(theirs.x.double().square().sum()) for _, theirs in pairs)


class _Rounder:
    """Reads weights as they would be stored."""

    def __init__(self, read: Read, recipes: Mapping[int, Recipe]) -> None:
        self.read = read
        self.recipes = recipes
        self.round_rows = recipes[min(recipes)].round_rows()  # that of them all

    def rounded(self, rows: Tensor, name: str, expert: int | None, bits: int | None) -> Tensor:
        """A parameter's rows [N, K] as the recipe of this width stores them, float32."""
        form = None if bits is None else self.recipes[bits].form(name, expert)
        if form is None or isinstance(form, Plain):
            return rows
        parts = self.round_rows(rows, form, name, expert)
        return form.unpack(parts[0], *rows.shape) if isinstance(form, Strips) else form.dequantize(*parts)

    def __call__(self, name: str, expert: int | None, bits: int | None) -> Tensor:
        return self.rounded(self.read(name, expert), name, expert, bits)


def _ends(layers: int, spans: int) -> list[int]:
    """Where the spans end: as many as there are, or as layers, of like lengths."""
    count = min(spans, layers)
    return [layers * (number + 1) // count for number in range(count)]


def _through_layer(
    config: PhiMoEConfig, rounder: _Rounder, number: int, streams: Sequence[_Stream], step: Callable[[], None]
) -> None:
    """Takes all streams through a layer."""
    rope = modeling.Rope(config)
    layers: dict[tuple[int | None, int | None], modeling.DecoderLayer] = {}
    step()
    for stream in streams:
        qkv, o = stream.width("q, k, v", number), stream.width("o", number)
        if (qkv, o) not in layers:
            layers[qkv, o] = _attention_layer(config, rounder, number, qkv, o)
        for state in stream.states:
            state.attend(layers[qkv, o], config, rope)
    del layers
    for expert in range(config.num_local_experts):
        step()
        matrices: dict[tuple[str, int | None], Tensor] = {}
        for stream, state in [(each, state) for each in streams for state in each.states]:
            if not (state.routing[-1] == expert).any():
                continue
            pair = []
            for kind in ("gate, up", "down"):
                name, bits = f"model.layers.{number}.{KINDS[kind][0]}", stream.width(kind, number)
                if (kind, None) not in matrices:
                    matrices[kind, None] = rounder.read(name, expert)
                if (kind, bits) not in matrices:
                    matrices[kind, bits] = rounder.rounded(matrices[kind, None], name, expert, bits)
                pair.append(matrices[kind, bits])
            modeling.add_expert(state.output, state.normed, state.weights, state.routing[-1], expert, *pair)
    for stream in streams:
        for state in stream.states:
            state.x += state.output


def _attention_layer(
    config: PhiMoEConfig, rounder: _Rounder, number: int, qkv: int | None, o: int | None
) -> modeling.DecoderLayer:
    """A layer without experts, with these widths."""

    def read(name: str, expert: int | None) -> Tensor:
        if name.endswith(KINDS["q, k, v"]):
            return rounder(name, expert, qkv)
        return rounder(name, expert, o if name.endswith(KINDS["o"]) else None)

    return read_layer(config, read, number)


def _log_probabilities(config: PhiMoEConfig, read: Read, stream: _Stream) -> Iterator[Tensor]:
    """Of each text, float32 [S, V]."""
    weight, bias = read("model.norm.weight", None), read("model.norm.bias", None)
    outputs = head(config, "text-generation", read)
    for state in stream.states:
        hidden = F.layer_norm(state.x, (config.hidden_size,), weight, bias, config.rms_norm_eps)
        yield outputs(hidden).log_softmax(dim=-1)


def _divergence(exact: Sequence[Tensor], others: Iterator[Tensor]) -> float:
    """The mean of a token's KL divergence, in nats."""
    pairs = zip(exact, others, strict=True)
    each = [(one.exp() * (one - other)).sum(dim=-1, dtype=torch.float64) for one, other in pairs]
    return max(0.0, float(torch.cat(each).mean()))


def _divergences(config: PhiMoEConfig, rounder: _Rounder, exact: _Stream, streams: Sequence[_Stream]) -> list[float]:
    read = _kept(rounder.read)
    expected = list(_log_probabilities(config, read, exact))
    return [_divergence(expected, _log_probabilities(config, read, stream)) for stream in streams]


def _head_divergences(
    config: PhiMoEConfig, rounder: _Rounder, exact: _Stream, widths: Sequence[int]
) -> Iterator[tuple[int, float]]:
    read = _kept(rounder.read)
    expected = list(_log_probabilities(config, read, exact))
    for bits in widths:

        def rounded(name: str, expert: int | None, bits: int = bits) -> Tensor:
            return rounder.rounded(read(name, expert), name, expert, bits if name == HEAD else None)

        yield bits, _divergence(expected, _log_probabilities(config, rounded, exact))


def _kept(read: Read) -> Read:
    """Reads each parameter once."""
    known: dict[str, Tensor] = {}

    def once(name: str, expert: int | None) -> Tensor:
        if name not in known:
            known[name] = read(name, expert)
        return known[name]

    return once
