"""convert(): a bundle of one kind of operators -> the same bundle of the other, without its checkpoint.

The graphs are made anew from config.json, as an export makes them. Their weights come from the bundle: what both kinds
store alike is copied, and two-level integers (strips.py) are laid out in the other way, so no number changes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.functional import pad

from phimoe_onnx import bundle
from phimoe_onnx._version import __version__
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.checkpoint.tensors import shapes
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import BundleError, ExportError
from phimoe_onnx.exporter.pipeline import build_graphs, described, write_genai, write_graphs
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.strips import BLOCK, Strips, expert_bytes, pack_expert, superblock_size
from phimoe_onnx.exporter.quantize.two_level import laid_out, split
from phimoe_onnx.exporter.recipe import CALIBRATED, HEAD, ROUTER, Recipe, is_matrix, recipe_for
from phimoe_onnx.exporter.staging import check_output, staged
from phimoe_onnx.exporter.target import CPU
from phimoe_onnx.exporter.trace import trace
from phimoe_onnx.exporter.weights import DTYPES, Job, Piece, Weight, interleaved, layer_of
from phimoe_onnx.progress import Progress, counter

OPTIONS = {"float32": "none", "float16": "fp16"}  # of --store, for what is stored without blocks
KV_CACHE = {"float32": "none", "float16": "fp16", "int8": "int8", "uint8": "int4"}  # by the cache's dtype
MAKES_ANEW = re.compile(r".*\.(onnx|data)|genai_config\.json")  # of the other operators
ROUNDED = re.compile(r"(.+)\.(codes|scales|strips)(\.\d+)?")  # the name of a rounded weight; its expert behind it

Integers = tuple[Tensor, Tensor, Tensor]  # levels, s and S, as `Strips.pack` has them


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    operators: str,
    block_size: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes the bundle `source` for another kind of operators: the same weights, integer by integer.

    Args:
        source: a bundle for the CPU whose int4 and int8 weights are two-level: of native operators, or of stock ones,
            as int4 is by default and int8 with `rounding="two-level"`.
        output: the new bundle's folder; by default `<name>-<operators>` in the working directory.
        operators: "stock" or "native", the kind that `source` has not.
        block_size: of stock operators, as for `export`.
        overwrite, progress: as for `export`.

    Returns:
        The bundle's folder, which appears only when it is complete.

    Raises:
        BundleError: the source is damaged.
        ExportError: it is not of a kind that can be converted, or the output cannot be written.
    """
    source = Path(source)
    output = Path(output) if output is not None else Path(f"{source.resolve().name}-{operators}")
    report = progress or (lambda phase, done, total: None)
    if output.resolve() == source.resolve():
        raise ExportError(f"{output}: is the bundle that is to be converted; name another --output")
    check_output(output, overwrite)
    report("reading", 0, 0)
    with bundle.unchanged(source) as manifest:
        config = read_config(source)
        recipe = converted_recipe(source, manifest, config, operators, block_size)
        total = sum(file.size for file in manifest.files.values())
        bundle.check_files(source, manifest, hash_everything=True, advance=counter(report, "checking", total))
        stored = StoredBundle(source, manifest, config, recipe)
        report("tracing", 0, 0)
        rows = {name: _shapes_alone(name, shape) for name, shape in shapes(config, recipe.task).items()}
        graphs = build_graphs(trace(config, rows, DTYPES[recipe.dtype], recipe.task), config, rows, recipe)
        for graph in graphs.values():
            stored.fill(graph)
        with staged(output, overwrite) as staging:
            nbytes = write_graphs(graphs, staging, recipe, stored.files, report)
            for name in manifest.files:
                if not MAKES_ANEW.fullmatch(name):
                    shutil.copyfile(source / name, staging / name)
            write_genai(source, staging, config, recipe)
            files = bundle.describe_files(staging, counter(report, "hashing", nbytes))
            replace(
                manifest,
                tool_version=__version__,
                recipe=recipe.digest(),
                weights=recipe.stored_weights(),
                graphs=described(recipe),
                files=files,
                parity=None,
            ).write(staging)
    return output


def converted_recipe(
    source: Path, manifest: bundle.Manifest, config: PhiMoEConfig, operators: str, block_size: int | None = None
) -> Recipe:
    """How the new bundle is stored: as the bundle `source`, but for the operators; options are those of `convert`.

    Raises:
        ExportError: it cannot be; it says why.
    """
    if manifest.target != CPU.name:  # the only one with two kinds of operators
        raise ExportError(f"{source}: is for --target {manifest.target}; only bundles for {CPU.name} can be converted")
    native = any(bundle.NATIVE_OPERATORS in graph.requires for graph in manifest.graphs)
    if operators == ("native" if native else "stock"):
        other = "stock" if native else "native"
        raise ExportError(f"{source}: has {operators} operators already; --operators {other} converts it")
    known = shapes(config, manifest.task)
    known.setdefault(HEAD, known["model.embed_tokens.weight"])  # a tied one is stored by itself
    store = {}
    for group in manifest.weights:
        for name in group.names():
            whole = name if name in known else name.rpartition(".")[0]  # NAME.EXPERT
            if whole not in known:
                raise BundleError(f"{source}: manifest.json tells of {name}, which is no parameter of this model")
            if group.block_size is not None and (not group.symmetric or group.block_size > BLOCK):
                which = f"blocks of {group.block_size}" if group.symmetric else "zero points"
                raise ExportError(f"{source}: {name} is stored with {which}, {_no_grid(operators)}")
            if group.dtype == "int2":
                raise ExportError(
                    f"{source}: {name} is int2, of which each kind of operators has levels of its own; export the "
                    f"checkpoint with --operators {operators}"
                )
            if is_matrix(whole, known[whole]):
                store[name] = OPTIONS.get(group.dtype, group.dtype)
    recipe = recipe_for(
        config,
        CPU,
        task=manifest.task,
        block_size=block_size,
        kv_cache=KV_CACHE.get(manifest.decoding.cache.dtype, "none"),
        store=store,
        operators=operators,
        rounding="two-level",
    )
    if manifest.calibration is not None:
        recipe = replace(recipe, rounding=CALIBRATED, calibration=str(manifest.calibration.get("windows")))
    return recipe


def _no_grid(operators: str) -> str:
    return (
        f"which is not on the two-level grid that both kinds of operators compute with; export the checkpoint with "
        f"--operators {operators}, or with --rounding two-level for a bundle that can be converted"
    )


def _shapes_alone(name: str, shape: tuple[int, ...]) -> tuple[Rows, ...]:
    """A parameter's rows for tracing; nothing reads them."""

    def unread() -> Tensor:
        raise AssertionError(f"{name} is read from the bundle")

    if len(shape) < 3:
        return (Rows(shape, unread),)
    number, n, k = shape
    parts = 2 if name.endswith("gate_up_proj") else 1
    return (Rows((n // parts, k), unread),) * (number * parts)


class StoredBundle:
    """The weights of a bundle, for graphs of the other operators.

    Args:
        folder: where it is.
        manifest: its manifest, whose files were checked.
        config: the model's shape.
        recipe: how the new bundle stores it.
    """

    def __init__(self, folder: Path, manifest: bundle.Manifest, config: PhiMoEConfig, recipe: Recipe) -> None:
        self.folder = folder
        self.config = config
        self.recipe = recipe
        self.places = _places(folder, manifest)
        self.files = [folder / name for name in manifest.files if name.endswith(".data")]
        self._jobs: dict[str, Job] = {}

    def fill(self, graph: ir.Model) -> None:
        """Gives each weight of a graph what the bundle stores for it, in the place of what would be computed.

        Raises:
            BundleError: the bundle lacks a weight.
        """
        for inner in (graph.graph, *graph.graph.subgraphs()):
            for value in inner.initializers.values():
                weight = value.const_value
                if isinstance(weight, Weight):
                    pieces = self._pieces(weight)
                    value.const_value = Weight(
                        weight.name, weight.dtype, weight.shape.numpy(), pieces, weight.parameter, weight.expert
                    )

    def _pieces(self, weight: Weight) -> list[Piece]:
        name, layer = weight.name, layer_of(weight.parameter or weight.name)
        place = self.places.get(name)
        if place is not None and (place.dtype, place.shape) == (weight.dtype, weight.shape):
            return [Piece(self._job(name, partial(self._copied, name), (weight.nbytes,), layer), 0)]
        if name.removesuffix(".transposed").endswith(ROUTER):
            return [Piece(self._job(name, partial(self._router, name), (weight.nbytes,), layer), 0)]
        rounded = ROUNDED.fullmatch(name)
        if rounded is None:
            raise self._lacks(name)
        stem, kind = rounded[1], rounded[2]
        if weight.parameter.endswith(("gate_up_proj", "down_proj")):
            prefix = stem.removesuffix(".fc1").removesuffix(".fc2")
            index = 0 if kind == "strips" else 2 * stem.endswith(".fc2") + (kind == "scales")
            experts = range(self.config.num_local_experts) if weight.expert is None else [weight.expert]
            return [Piece(self._expert_job(prefix, expert, layer), index) for expert in experts]
        return [Piece(self._matrix_job(stem, weight.parameter, layer), int(kind == "scales"))]

    def _job(self, key: str, run: Callable[[], tuple[Tensor, ...]], nbytes: tuple[int, ...], layer: int) -> Job:
        """One for each key: graphs share their pieces."""
        return self._jobs.setdefault(key, Job(run, nbytes, layer))

    def _matrix_job(self, stem: str, parameter: str, layer: int) -> Job:
        """A projection's codes and scales, or strips."""
        form = self.recipe.form(parameter)
        assert isinstance(form, Format | Strips)
        n, k = self._shape(stem, parameter)
        return self._job(stem, lambda: laid_out(form, *self._matrix(stem, form.bits, n, k)), form.nbytes(n, k), layer)

    def _expert_job(self, prefix: str, expert: int, layer: int) -> Job:
        """An expert's strips, or codes and scales of fc1 and of fc2; `prefix` is that of the layer's stacks."""
        n, k = self.config.intermediate_size, self.config.hidden_size
        forms = [self.recipe.form(f"{prefix}.{stack}", expert) for stack in ("gate_up_proj", "down_proj")]
        gate_up, down = forms
        assert isinstance(gate_up, Format | Strips)
        assert isinstance(down, Format | Strips)

        def run() -> tuple[Tensor, ...]:
            gate, up, rest = self._expert(prefix, expert, gate_up.bits, down.bits)
            pairs = [laid_out(gate_up, *part) for part in (gate, up)]
            own = laid_out(down, *rest)
            if isinstance(gate_up, Strips):
                return (pack_expert(pairs[0][0], pairs[1][0], own[0]),)
            return (*(interleaved(parts) for parts in zip(*pairs, strict=True)), *own)

        if isinstance(gate_up, Strips) and isinstance(down, Strips):
            nbytes: tuple[int, ...] = (expert_bytes(gate_up, down, k, n),)
        else:
            nbytes = (*gate_up.nbytes(2 * n, k), *down.nbytes(k, n))
        return self._job(f"{prefix}.{expert}", run, nbytes, layer)

    def _shape(self, stem: str, parameter: str) -> tuple[int, int]:
        """[N, K] of a projection, or of three packed as one."""
        known = shapes(self.config, self.recipe.task)
        shape = known.get(parameter, known["model.embed_tokens.weight"])  # a tied head's
        heads = self.config.num_attention_heads + 2 * self.config.num_key_value_heads
        return (heads * self.config.head_dim if stem.endswith("qkv_proj") else shape[0]), shape[1]

    def _expert(self, prefix: str, expert: int, pairs: int, down: int) -> tuple[Integers, Integers, Integers]:
        """Gate, up and down of an expert, of so many bits."""
        n, k = self.config.intermediate_size, self.config.hidden_size
        if f"{prefix}.strips" not in self.places:
            levels, s, S = self._matrix(f"{prefix}.fc1", pairs, 2 * n, k, expert)
            own = self._matrix(f"{prefix}.fc2", down, k, n, expert)
            return (levels[::2], s[::2], S[::2]), (levels[1::2], s[1::2], S[1::2]), own
        packed = self._read(f"{prefix}.strips", expert)
        first, second = Strips(pairs), Strips(down)
        size = 2 * first.nbytes(n, k)[0]
        gate, up = packed[:size].view(-1, 2, first.strip_bytes(k)).unbind(1)
        rest = packed[size:].view(-1, second.strip_bytes(n))
        return first.integers(gate, n, k), first.integers(up, n, k), second.integers(rest, k, n)

    def _matrix(self, stem: str, bits: int, n: int, k: int, expert: int | None = None) -> Integers:
        """A matrix [n, k] of so many bits, of a stack the one of `expert`."""
        if f"{stem}.strips" in self.places:
            form = Strips(bits)
            return form.integers(self._read(f"{stem}.strips").view(-1, form.strip_bytes(k)), n, k)
        codes = self._read(f"{stem}.codes", expert).view(n, -1)
        scales = self._read(f"{stem}.scales", expert).view(torch.float32).view(n, -1)
        size = k // scales.shape[1]
        levels = (Format(bits, size).unpack(codes, k).to(torch.int16) - (1 << bits - 1)).to(torch.int8)
        blocks, every = -(-k // BLOCK), BLOCK // size
        grid = pad(scales[:, ::every], (0, blocks % 2)).view(n, -1, superblock_size(k) // BLOCK)
        if bits == 8:
            S, s = grid.amax(dim=-1).bfloat16(), torch.ones(n, blocks, dtype=torch.uint8)
        else:
            S, inner = split(grid)
            s = inner.view(n, -1)[:, :blocks]
        found = S.float().repeat_interleave(grid.shape[-1], dim=1)[:, :blocks] * s
        if not torch.equal(found.repeat_interleave(every, dim=1)[:, : scales.shape[1]], scales):
            raise ExportError(f"{self.folder}: the scales of {stem} are rounded to nearest, {_no_grid('native')}")
        return levels, s, S

    def _copied(self, name: str) -> tuple[Tensor]:
        return (self._read(name),)

    def _router(self, name: str) -> tuple[Tensor]:
        """[E, H] for native operators, [H, E] for stock ones."""
        plain = name.removesuffix(".transposed")
        stored = plain if name != plain else f"{plain}.transposed"
        if stored not in self.places:
            raise self._lacks(name)
        rows = self._read(stored).view(torch.float32).view(*self.places[stored].shape.numpy())
        return (rows.T.contiguous(),)

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        """A weight's bytes, or those of one expert of a stack, which may be a weight of its own."""
        own = name if expert is None else f"{name}.{expert}"
        place = self.places.get(own, self.places.get(name))
        if place is None:
            raise self._lacks(name)
        offset, length = place.offset or 0, place.nbytes
        if expert is not None and own not in self.places:
            length //= self.config.num_local_experts
            offset += expert * length
        path = self.folder / place.location
        with path.open("rb") as file:
            file.seek(offset)
            data = bytearray(file.read(length))
        if len(data) != length:
            raise BundleError(
                f"{path}: {name} should be the {length} bytes from {offset} on, but the file ends before; copy or "
                f"export the bundle again"
            )
        return torch.frombuffer(data, dtype=torch.uint8)

    def _lacks(self, name: str) -> BundleError:
        return BundleError(f"{self.folder}: its graphs have no weights for {name}; export the bundle again")


def _places(folder: Path, manifest: bundle.Manifest) -> Mapping[str, ir.ExternalTensor]:
    """Where each weight of the bundle's graphs lies, by its name."""
    places: dict[str, ir.ExternalTensor] = {}
    for described_graph in manifest.graphs:
        model = ir.load(folder / described_graph.file)
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    if tensor.location not in manifest.files:
                        raise BundleError(f"{folder}: {name} lies in {tensor.location}, which is no file of the bundle")
                    places.setdefault(name, tensor)
    return places
