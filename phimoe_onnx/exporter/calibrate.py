"""The calibration: takes a text through the checkpoint layer by layer and rounds each matrix for the inputs that it is
given there.

Two streams of hidden states run beside each other: that of the model as it is stored, whose experts its own router
chooses, and that of the checkpoint. Each matrix is first corrected so that it makes of the first stream's inputs what
it made of the second's, then rounded under the first stream's moments (quantize/gptq.py). The router is corrected the
same way and stays float32. A weight is read when its turn comes and forgotten after it; hidden states lie on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phimoe_onnx import modeling
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.calibration_folder import CalibrationFolder, Facts, Unit
from phimoe_onnx.exporter.quantize.calibrated import stored
from phimoe_onnx.exporter.quantize.format import Plain
from phimoe_onnx.exporter.quantize.gptq import DAMPING, GRIDS, Moments, Rounder, Sums, corrected
from phimoe_onnx.exporter.recipe import HEAD, Recipe
from phimoe_onnx.layered import CHUNK, Read, checkpoint_weights
from phimoe_onnx.progress import Progress
from phimoe_onnx.scratch import Scratch

SAMPLE = 4096  # tokens of the whole text that an expert's second projection is shown beside its own
QUERIES = 256  # tokens that attend at once: with more of them, more is computed that none may look at
PHASE = "calibrating"
Added = tuple[Tensor, Tensor, Tensor | None]  # as `Sums.add` takes it
Chosen = tuple[Tensor, Tensor]  # tokens [C] that chose an expert, ascending, and its weight for each


@torch.inference_mode()
def calibrate(
    config: PhiMoEConfig,
    recipe: Recipe,
    rows: dict[str, tuple[Rows, ...]],
    windows: Sequence[Sequence[int]],
    folder: CalibrationFolder,
    report: Progress,
) -> None:
    """Finds every matrix that the recipe rounds, but for the embeddings, and the routers, and leaves them in `folder`.

    A layer is finished when all of it is there, with the hidden states behind it; a run goes on after the last such
    layer. The same rows, windows and recipe give the same bytes on the same machine with as many threads.

    Args:
        config: the model's shape.
        recipe: how each parameter is stored.
        rows: the checkpoint's parameters, as `checkpoint.parameters` gives them.
        windows: token ids; each is a text of its own.
        folder: where what is found lies.
        report: called with the phase, the layer, the expert and the error so far, and the bytes of weights in float32
            that are done and to do.

    Raises:
        ExportError: the folder cannot be written.
        PhiMoEError: the disk has no room for the hidden states.
    """
    walk = _Walk(config, recipe, checkpoint_weights(config, rows), windows, folder, _Told(config, rows, report))
    first = folder.finished
    walk.told.skip(first)
    if first == 0:
        walk.embed()
    elif first <= config.num_hidden_layers:
        folder.load_states(first, walk.x, walk.y)
    for layer in range(first, config.num_hidden_layers):
        walk.layer(layer)
        folder.finish(layer + 1, walk.x, walk.y)
    if first <= config.num_hidden_layers:
        walk.head()
        folder.finish(config.num_hidden_layers + 1)


class _Told:
    """Counts what is done and says it."""

    def __init__(self, config: PhiMoEConfig, rows: dict[str, tuple[Rows, ...]], report: Progress) -> None:
        self.layers, self.experts = config.num_hidden_layers, config.num_local_experts
        self.report = report
        sizes = {
            name: sum(math.prod(part.shape) for part in parts) * 4
            for name, parts in rows.items()
            if name.endswith(("_proj.weight", "_proj", HEAD))
        }
        self.total = sum(sizes.values())
        self.each = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
        self.done = 0
        self.error = self.weight = 0.0

    def skip(self, layers: int) -> None:
        """Takes finished layers as done."""
        self.done = self.total if layers > self.layers else layers * self.each

    def say(self, layer: int, what: str, count: int = 0) -> None:
        """Where it is, after `count` more weights."""
        self.done += 4 * count
        error = f", error {math.sqrt(self.error / self.weight):.1%}" if self.weight else ""
        where = f"layer {layer + 1} of {self.layers}, {what}" if layer < self.layers else what
        self.report(f"{PHASE}: {where}{error}", self.done, self.total)

    def add(self, error: float, square: float, count: int) -> None:
        """Takes the error of a matrix's outputs, as a share of their square."""
        if square > 0:
            self.error += count * error / square
            self.weight += count


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Walk:
    """Where the calibration is: x [T, H] of the stored model and y of the checkpoint, all windows one after the other;
    what goes into the next matrices is `x_in` and `y_in`, or `x_heads` and `y_heads`. The room of the latter two is
    also that of the `inner` numbers of an expert, [T, I] of the stored model.
    """

    def __init__(
        self,
        config: PhiMoEConfig,
        recipe: Recipe,
        read: Read,
        windows: Sequence[Sequence[int]],
        folder: CalibrationFolder,
        told: _Told,
    ) -> None:
        self.config, self.recipe, self.read, self.windows = config, recipe, read, windows
        self.folder, self.told = folder, told
        self.tokens = sum(map(len, windows))
        scratch = Scratch()
        heads, inner = config.num_attention_heads * config.head_dim, config.intermediate_size
        shapes = [(self.tokens, config.hidden_size)] * 4 + [(self.tokens * max(2 * heads, inner),)]
        self.x, self.y, self.x_in, self.y_in, room = (torch.from_numpy(scratch.empty(*shape)) for shape in shapes)
        self.x_heads, self.y_heads = room[: 2 * self.tokens * heads].view(2, self.tokens, heads)
        self.inner = room[: self.tokens * inner].view(self.tokens, inner)
        self.rope = modeling.Rope(config)

    def embed(self) -> None:
        """Begins both streams; the embeddings' own rounding is so fine that it is left out."""
        embeddings, start = self.read("model.embed_tokens.weight", None), 0
        for window in self.windows:
            self.x[start : start + len(window)] = F.embedding(torch.tensor(list(window)), embeddings)
            start += len(window)
        self.y.copy_(self.x)

    def layer(self, number: int) -> None:
        """Takes both streams through a layer, and rounds its matrices on the way."""
        prefix = f"model.layers.{number}."
        self.told.say(number, "attention")
        self._normalise(f"{prefix}input_layernorm")
        self._attention(number, f"{prefix}self_attn.")
        self._normalise(f"{prefix}post_attention_layernorm")
        self._experts(number, f"{prefix}block_sparse_moe.")

    def head(self) -> None:
        """Rounds lm_head, if there is one of its own."""
        layers = self.config.num_hidden_layers
        with self.folder.unit("head") as unit:
            if HEAD in self.recipe.forms and not self.config.tie_word_embeddings and self._bits(HEAD, None):
                self.told.say(layers, "lm_head")
                self._normalise("model.norm")
                weight = self.read(HEAD, None)
                self._round([(HEAD, weight)], None, self._pooled(self.x_in, self.y_in), unit)
                self.told.say(layers, "lm_head", weight.numel())

    def _attention(self, number: int, prefix: str) -> None:
        names = [f"{prefix}{part}_proj.weight" for part in "qkv"]
        old = [self.read(name, None) for name in names]
        biases = [self._bias(f"{prefix}{part}_proj.bias") for part in "qkvo"]
        with self.folder.unit(f"{number}.attention") as unit:
            new = self._round(list(zip(names, old, strict=True)), None, self._pooled(self.x_in, self.y_in), unit)
            self._attend(self.x_in, self.x_heads, new, biases)
            self._attend(self.y_in, self.y_heads, old, biases)
            name = f"{prefix}o_proj.weight"
            out = self.read(name, None)
            (rounded,) = self._round([(name, out)], None, self._pooled(self.x_heads, self.y_heads), unit)
        for span in _chunks(self.tokens):
            self.x[span] += F.linear(self.x_heads[span], rounded, biases[3])
            self.y[span] += F.linear(self.y_heads[span], out, biases[3])
        self.told.say(number, "attention", sum(weight.numel() for weight in (*old, out)))

    def _attend(
        self, normed: Tensor, heads: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> None:
        """The heads' outputs of a stream, window by window, a chunk of each at a time."""
        config, start = self.config, 0
        for window in self.windows:
            past: modeling.KeyValue = (torch.empty(1, config.num_key_value_heads, 0, config.head_dim),) * 2
            for chunk in _chunks(len(window)):
                x = normed[start + chunk.start : start + chunk.stop][None]
                projected = [F.linear(x, *both) for both in zip(weights, biases[:3], strict=True)]
                for first in range(chunk.start, chunk.stop, QUERIES):
                    last = min(first + QUERIES, chunk.stop)
                    query, key, value = (part[:, first - chunk.start : last - chunk.start] for part in projected)
                    mask, length = torch.ones(1, last, dtype=torch.int64), torch.tensor([len(window)])
                    cos, sin, visible = modeling.places(config, self.rope, last - first, mask, length)
                    output, *cache = modeling.attention(query, key, value, cos, sin, *past, visible)
                    past = (cache[0], cache[1])
                    heads[start + first : start + last] = output[0]
            start += len(window)

    def _experts(self, number: int, prefix: str) -> None:
        pooled = self._pooled(self.x_in, self.y_in)
        router = self.read(f"{prefix}gate.weight", None)
        refitted = corrected(router, pooled, DAMPING)
        with self.folder.unit(f"{number}.router") as unit:
            unit.add(f"{prefix}gate.weight", {"": refitted})
        jitter = self.config.router_jitter_noise
        routes = [
            modeling.sparse_mixer(torch.cat([F.linear(normed[span], gate) for span in _chunks(self.tokens)]), jitter)
            for normed, gate in ((self.x_in, refitted), (self.y_in, router))
        ]
        for expert in range(self.config.num_local_experts):
            self.told.say(number, f"expert {expert + 1} of {self.config.num_local_experts}")
            self._expert(number, expert, f"{prefix}experts.", pooled, routes)

    def _expert(
        self, number: int, expert: int, prefix: str, pooled: Moments, routes: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Rounds an expert and adds to both streams what it gives the tokens that chose it there."""
        own, theirs = (_chosen(*route, expert) for route in routes)
        tokens, weights = own
        gate_up, down = (self.read(f"{prefix}{stack}_proj", expert) for stack in ("gate_up", "down"))
        share = len(tokens) / self.tokens
        with self.folder.unit(f"{number}.{expert}") as unit:
            inputs = (
                (self.x_in[tokens[span]], self.y_in[tokens[span]], weights[span].square())
                for span in _chunks(len(tokens))
            )
            moments, rho = _moments(self.config.hidden_size, inputs, share).shrunk(pooled)
            (new_gate_up,) = self._round([(f"{prefix}gate_up_proj", gate_up)], expert, moments, unit)
            del moments  # before those of the second
            moments = self._inner_moments(own, theirs, new_gate_up, gate_up, down)
            (new_down,) = self._round([(f"{prefix}down_proj", down)], expert, moments, unit)
            unit.facts = Facts(number, expert, len(tokens), rho)
        for span in _chunks(len(tokens)):
            self.x.index_add_(0, tokens[span], F.linear(self.inner[span], new_down) * weights[span, None])
        self.told.say(number, f"expert {expert + 1} of {self.config.num_local_experts}", gate_up.numel() + down.numel())

    def _inner_moments(
        self, own: Chosen, theirs: Chosen, new_gate_up: Tensor, gate_up: Tensor, down: Tensor
    ) -> Moments:
        """Those of an expert's second projection. Its inputs are computed once, and all that they are good for is done
        here: those of the stored model's own tokens are left in `inner`, the checkpoint's stream gets its output.
        """
        of_own, of_all, filled = Sums(len(down.T)), Sums(len(down.T)), 0
        (is_own, weights), (is_theirs, their_weights) = (_spread(*chosen, self.tokens) for chosen in (own, theirs))
        is_sample = torch.zeros(self.tokens, dtype=torch.bool)
        is_sample[:: max(1, self.tokens // SAMPLE)] = True
        wanted = (is_own | is_theirs | is_sample).nonzero()[:, 0]
        for span in _chunks(len(wanted)):
            tokens = wanted[span]
            y, chosen = _inner(self.y_in[tokens], gate_up), is_theirs[tokens]
            given = F.linear(y[chosen], down) * their_weights[tokens[chosen], None]
            self.y.index_add_(0, tokens[chosen], given)
            seen = is_own[tokens] | is_sample[tokens]
            tokens, y = tokens[seen], y[seen]
            x, chosen = _inner(self.x_in[tokens], new_gate_up), is_own[tokens]
            kept = x[chosen]
            self.inner[filled : filled + len(kept)] = kept
            filled += len(kept)
            of_own.add(kept, y[chosen], weights[tokens[chosen]].square())
            sample = is_sample[tokens]
            of_all.add(x[sample], y[sample])
        return of_own.moments(len(own[0]) / self.tokens).shrunk(of_all.moments())[0]

    def _round(
        self, matrices: Sequence[tuple[str, Tensor]], expert: int | None, moments: Moments, unit: Unit
    ) -> list[Tensor]:
        """The matrices, all of the same inputs, as they are stored; they go into `unit`."""
        rounders: dict[int, Rounder] = {}
        found = []
        for name, weight in matrices:
            bits = self._bits(name, expert)
            if bits is None:
                form = self.recipe.form(name, expert)
                found.append(weight.half().float() if form == Plain("float16") else weight)
                continue
            if bits not in rounders:
                rounders[bits] = Rounder(moments.inputs, GRIDS[bits], moments.drift)
            rounded, error, square = rounders[bits].round(weight)
            self.told.add(error, square, weight.numel())
            unit.add(name if expert is None else f"{name}.{expert}", stored(rounded, bits))
            found.append(rounded.dequantize())
        return found

    def _bits(self, name: str, expert: int | None) -> int | None:
        form = self.recipe.form(name, expert)
        return None if isinstance(form, Plain) else form.bits

    def _bias(self, name: str) -> Tensor | None:
        return self.read(name, None) if self.config.attention_bias else None

    def _normalise(self, name: str) -> None:
        norm = _Norm(self.read(f"{name}.weight", None), self.read(f"{name}.bias", None), self.config.rms_norm_eps)
        for span in _chunks(self.tokens):
            self.x_in[span] = norm(self.x[span])
            self.y_in[span] = norm(self.y[span])

    def _pooled(self, x: Tensor, y: Tensor) -> Moments:
        return _moments(x.shape[1], ((x[span], y[span], None) for span in _chunks(self.tokens)))


def _moments(k: int, added: Iterable[Added], share: float = 0.0) -> Moments:
    sums = Sums(k)
    for x, y, weight in added:
        sums.add(x, y, weight)
    return sums.moments(share)


def _chosen(weights: Tensor, chosen: Tensor, expert: int) -> Chosen:
    tokens, slots = (chosen == expert).nonzero(as_tuple=True)
    return tokens, weights[tokens, slots]


def _spread(tokens: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each of `count` tokens whether it is one of these, bool, and its weight, 0 for the others."""
    is_one, weight = torch.zeros(count, dtype=torch.bool), torch.zeros(count)
    is_one[tokens], weight[tokens] = True, weights
    return is_one, weight


def _inner(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def _chunks(tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK))
