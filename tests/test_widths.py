"""Widths of 2 and 3 bits, and --bits and --fit, which choose widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phimoe_onnx import export, operators, verify
from phimoe_onnx.bench.traffic import step_bytes
from phimoe_onnx.bundle import describe_files, read_manifest
from phimoe_onnx.checkpoint.tensors import parameters, read_headers, shapes
from phimoe_onnx.cli.export import main
from phimoe_onnx.config import parse_config, read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter import recipe as recipe_module
from phimoe_onnx.exporter import widths as module
from phimoe_onnx.exporter.places import KINDS, Place, places
from phimoe_onnx.exporter.plan import EXPORTER, requirements
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.measure import measure
from phimoe_onnx.exporter.quantize.rtn import round_to_nearest
from phimoe_onnx.exporter.quantize.strips import Strips
from phimoe_onnx.exporter.quantize.two_level import round_two_level
from phimoe_onnx.exporter.recipe import MIXED, Recipe, recipe_for
from phimoe_onnx.exporter.sizes import average_bits, count_weights, parse_size, shown, stored_bytes
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.exporter.widths import PASSAGE, Widths, check_widths, cut
from phimoe_onnx.layered import Read, Text, checkpoint_weights, head, run
from phimoe_onnx.parity.thresholds import Thresholds
from tests.checkpoints import BASE, MODEL, SHAPES

Checkpoint = Callable[..., Path]
CPU, CONFIG = TARGETS["cpu"], parse_config(BASE)
TEXT = "It was a fine morning, and nobody had anything to do. " * 20
LOOSE = Thresholds(kl=5.0, kernel_kl=0.1)  # a random model's logits say little
built = pytest.mark.skipif(operators.library() is None, reason="the library of the native operators is not built here")


@pytest.fixture(scope="module", autouse=True)
def once() -> Iterator[None]:
    """Measuring takes most of the time of so small an export; the same is measured once."""
    costs: dict[Any, Any] = {}

    def measure_once(config: Any, read: Any, recipes: dict[int, Recipe], windows: Any, **options: Any) -> Any:
        key = str(([recipe.digest() for recipe in recipes.values()], windows))
        if key not in costs:
            costs[key] = measure(config, read, recipes, windows, **options)
        return costs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", measure_once)
        yield


@built
@pytest.mark.parametrize(("bits", "store"), [(2, {}), (3, {"*.down_proj": "int2", "lm_head.weight": "int8"})])
def test_native_operators_compute_with_2_and_3_bits(
    tmp_path: Path, checkpoint: Checkpoint, bits: int, store: dict[str, str]
) -> None:
    """As PyTorch does over the weights that are stored, which are far from the checkpoint's."""
    source = checkpoint("longrope-window")
    folder = export(source, tmp_path / "bundle", quantize=f"int{bits}", operators="native", store=store)
    assert {group.dtype for group in read_manifest(folder).weights} >= {f"int{bits}", *store.values()}
    report = verify(folder, source, tokens=150, new_tokens=8, thresholds=LOOSE)
    assert report.failures == []
    assert report.bundle_to_stored is not None
    assert report.bundle_to_stored.mean_difference < 0.1
    assert report.bundle_to_reference.mean_difference > 0.2
    if not store:
        assert step_bytes(folder, read_manifest(folder), 1, 0) == pytest.approx(bytes_of_a_step(source), abs=1)


def bytes_of_a_step(source: Path) -> float:
    """Of 2 bits, with a block's scale of 4 bits; a step reads two of sixteen experts, and the router in float32."""
    sizes = {name: math.prod(shape) for name, shape in shapes(read_config(source)).items()}
    return sum(
        size * (4 if ".gate." in name else 2.125 / 8) * (2 / 16 if ".experts." in name else 1)
        for name, size in sizes.items()
        if name.endswith(("_proj", "_proj.weight", "gate.weight", "lm_head.weight"))
    )


def test_stock_operators_compute_with_2_bits(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """In both graphs."""
    source = checkpoint("longrope-window")
    folder = export(source, tmp_path / "bundle", quantize="int2", operators="stock")
    manifest = read_manifest(folder)
    devices = {graph.file: graph.devices["cpu"] for graph in manifest.graphs}
    assert devices == {"model.onnx": "1.31", "model.branches.onnx": "1.29"}
    for graph in manifest.graphs:
        replace(manifest, graphs=(graph,)).write(folder)
        report = verify(folder, source, tokens=150, new_tokens=4, thresholds=LOOSE)
        assert report.failures == []
        assert report.bundle_to_stored is not None
        assert report.bundle_to_stored.mean_difference < 0.2


def test_spans_divide_as_single_layers_measure() -> None:
    """Two layers of the trained model as one span, against every layer, kind and width by itself: costs are near, and
    what is chosen by them costs little more than the best. And these costs against models that store one place so, with
    the float model's experts, and all but the head.
    """
    read = checkpoint_weights(read_config(MODEL), parameters(read_config(MODEL), read_headers(MODEL)))
    widths = Widths(replace(read_config(MODEL), num_hidden_layers=2), CPU, {"operators": "native"})
    widths.recipes = recipes = {bits: widths.recipes[bits] for bits in (2, 4)}
    windows = [passage()[:128]]
    alone = measure(widths.config, read, recipes, windows, spans=2)
    spans = measure(widths.config, read, recipes, windows, spans=1)
    assert spans[Place("lm_head", 2)] == alone[Place("lm_head", 2)]
    logs = [
        math.log(spans[place][bits] / alone[place][bits]) for place in places(widths.config)[:-1] for bits in recipes
    ]
    assert 0 < np.mean(np.abs(logs)) < math.log(1.5)
    for average in (4.2, 4.6, 5.0):
        chosen = []
        for widths.costs in (spans, alone):
            recipe = widths.within(int(average * count_weights(widths.config, widths.smallest()) / 8))
            chosen.append(
                sum(
                    alone[place][bits]
                    for place in places(widths.config)
                    for bits in recipes
                    if recipe.forms[place.parameters()[0]] == recipes[bits].forms[place.parameters()[0]]
                )
            )
        assert chosen[1] <= chosen[0] <= 1.25 * chosen[1]

    everywhere = places(widths.config)[:-1]
    down, o = Place("down", 1), Place("o", 0)
    together = divergence(widths, read, windows[0], everywhere, held=False)
    of_down, of_o = (divergence(widths, read, windows[0], [place], held=True) for place in (down, o))
    assert sum(alone[place][2] for place in everywhere) == pytest.approx(together, rel=0.02)
    assert alone[down][2] / alone[o][2] == pytest.approx(of_down / of_o, rel=0.02)


def divergence(widths: Widths, read: Read, token_ids: list[int], rounded: Sequence[Place], *, held: bool) -> float:
    """Of a model that stores these places in 2 bits, with the experts of the float model or its own."""
    names = {name for place in rounded for name in place.parameters()}

    def stored(name: str, expert: int | None) -> torch.Tensor:
        matrix = read(name, expert)
        if name not in names:
            return matrix
        strips = widths.recipes[2].form(name, expert)
        assert isinstance(strips, Strips)
        return strips.unpack(*widths.recipes[2].round_rows()(matrix, strips, name, expert), *matrix.shape)

    (exact,) = run(widths.config, read, [Text(token_ids)])
    (found,) = run(widths.config, stored, [Text(token_ids, exact.routing if held else None)])
    outputs = head(widths.config, "text-generation", read)
    one, other = (outputs(ran.hidden).double().log_softmax(dim=-1) for ran in (exact, found))
    return float((one.exp() * (one - other)).sum(dim=-1).mean())


def passage() -> list[int]:
    return list(cut(PASSAGE.read_text(encoding="utf-8"), MODEL, read_config(MODEL))[0])


def better_steps(widths: Widths, recipe: Recipe) -> list[int]:
    """Bytes by which each better choice of each item is larger."""
    steps = []
    for item in widths.items:
        names = [name for place in item for name in place.parameters()]
        sizes = {
            bits: sum(stored_bytes(widths.config, each, name) for name in names)
            for bits, each in widths.recipes.items()
        }
        costs = {bits: sum(widths.costs[place][bits] for place in item) for bits in widths.recipes}
        (now,) = (bits for bits, each in widths.recipes.items() if each.forms[names[0]] == recipe.forms[names[0]])
        assert {recipe.forms[name] for name in names} == {recipe.forms[names[0]]}
        steps += [sizes[bits] - sizes[now] for bits in sizes if costs[bits] < costs[now]]
    return steps


def test_stock_widths_have_one_rounding() -> None:
    """What is measured is what is written: 2 bits to nearest, the others on the grid of both kinds of operators."""
    config = parse_config(BASE | SHAPES["tiles"])
    widths = Widths(config, CPU, {"operators": "stock"})
    assert {recipe.rounding for recipe in widths.recipes.values()} == {"two-level"}
    forms = {bits: str(recipe.form("lm_head.weight")) for bits, recipe in widths.recipes.items()}
    assert forms == {2: "int2, block 64", 4: "int4, block 32", 8: "int8, block 32"}
    round_rows = widths.smallest().round_rows()
    weight = torch.linspace(-1, 1, 4 * 64).view(4, 64)
    for bits, function in ((2, round_to_nearest), (4, round_two_level), (8, round_two_level)):
        form = widths.recipes[bits].form("lm_head.weight")
        assert isinstance(form, Format)
        found, expected = (each(weight, form, "", None) for each in (round_rows, function))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    plain = Widths(config, CPU, {"rounding": "rtn"})
    assert {recipe.rounding for recipe in plain.recipes.values()} == {"rtn"}
    assert {recipe.rounding for recipe in Widths(config, TARGETS["portable"], {}).recipes.values()} == {"rtn"}


@pytest.mark.parametrize("kind", ["native", "stock"])
def test_bits_is_the_average_of_all_that_is_stored(tmp_path: Path, checkpoint: Checkpoint, kind: str) -> None:
    source = checkpoint("longrope-window")
    config = read_config(source)
    folder = export(source, tmp_path / "bundle", bits=4.5, text=TEXT, operators=kind)
    manifest = read_manifest(folder)
    recipe = measured(source, kind).within(int(4.5 * weights(source) / 8))
    assert (manifest.quantize, manifest.recipe) == ("mixed", recipe.digest())
    assert manifest.weights == recipe.stored_weights()
    assert len({form for forms in recipe.forms.values() for form in forms}) > 2
    data = sum(path.stat().st_size for path in folder.glob("*.data"))
    tables = 2 * (32 + 128) * 8 * 4
    assert 8 * (data - tables) / weights(source) == pytest.approx(average_bits(config, recipe), abs=0.01)
    assert average_bits(config, recipe) <= 4.5
    left = int((4.5 - average_bits(config, recipe)) * weights(source) / 8)
    assert min(better_steps(measured(source, kind), recipe)) > left


def test_the_same_options_give_the_same_bytes(tmp_path: Path, checkpoint: Checkpoint) -> None:
    source = checkpoint("longrope-window")
    widths, config = measured(source, "native"), read_config(source)
    read = checkpoint_weights(config, parameters(config, read_headers(source)))
    assert measure(config, read, widths.recipes, cut(TEXT, source, config)) == widths.costs
    folders = [export(source, tmp_path / name, bits=4.5, text=TEXT, operators="native") for name in ("a", "b")]
    assert describe_files(folders[0]) == describe_files(folders[1])
    assert read_manifest(folders[0]) == read_manifest(folders[1])


def weights(source: Path) -> int:
    return sum(
        math.prod(part.shape)
        for parts in parameters(read_config(source), read_headers(source)).values()
        for part in parts
    )


def measured(source: Path, kind: str) -> Widths:
    config = read_config(source)
    widths = Widths(config, CPU, {"operators": kind})
    read = checkpoint_weights(config, parameters(config, read_headers(source)))
    widths.measure(read, TEXT, source, lambda phase, done, total: None)
    return widths


def test_plan_counts_what_measuring_takes() -> None:
    """With widths of 4096, 85 streams of 1,024 tokens, three arrays each, are more than all else."""
    config = replace(parse_config(BASE), hidden_size=4096, num_hidden_layers=4)
    recipe = recipe_for(config, CPU, "int4", operators="native")
    more = requirements(config, replace(recipe, quantize=MIXED)).export_memory
    assert more == EXPORTER + 85 * 3 * 4 * 1024 * 4096
    assert requirements(config, recipe).export_memory < more


def test_fit_is_as_large_as_fits(tmp_path: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = checkpoint("longrope-window"), tmp_path / "bundle"
    options = ["--fit", "760 kB", "--operators", "native", "--text", str(tmp_path / "text.txt")]
    (tmp_path / "text.txt").write_text(TEXT)
    assert main([str(source), *options, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert not folder.exists()
    assert main([str(source), *options, "-o", str(folder)]) == 0
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert total <= 760_000
    widths = measured(source, "native")
    manifest = read_manifest(folder)
    store = {name: group.dtype for group in manifest.weights for name in group.names() if group.layout == "strips"}
    recipe = recipe_for(widths.config, CPU, "int8", operators="native", store=store)
    assert recipe.digest() == manifest.recipe
    assert min(better_steps(widths, recipe)) > 760_000 - total
    for layer in range(2):
        line = next(line.strip() for line in planned.splitlines() if line.split()[:1] == [str(layer)])
        forms = [str(recipe.form(Place(kind, layer).parameters()[0])) for kind in KINDS]
        assert all(form in line for form in forms)
    assert f"{average_bits(widths.config, recipe):.3f} bits a weight" in planned


def test_what_store_fixes_stays(checkpoint: Checkpoint) -> None:
    widths = Widths(
        CONFIG, CPU, {"operators": "native", "store": {"lm_head.weight": "int4", "*.0.*.down_proj": "int3"}}
    )
    places_left = [place for item in widths.items for place in item]
    assert Place("lm_head", 2) not in places_left
    assert Place("down", 0) not in places_left
    assert len(places_left) == 2 * 4 - 1
    assert {str(widths.smallest().form("lm_head.weight")), str(widths.largest().form("lm_head.weight"))} == {
        "int4 in strips"
    }


def test_the_target_and_its_operators_say_what_may_be_chosen() -> None:
    assert sorted(Widths(CONFIG, CPU, {"operators": "native"}).recipes) == [2, 3, 4, 8]
    assert sorted(Widths(CONFIG, CPU, {"operators": "stock"}).recipes) == [2, 4, 8]
    assert sorted(Widths(CONFIG, CPU, {"block_size": 16}).recipes) == [4, 8]
    assert sorted(Widths(CONFIG, TARGETS["portable"], {}).recipes) == [4, 8]
    assert [len(item) for item in Widths(CONFIG, CPU, {"operators": "stock"}).items] == [1, 1, 2] * 2 + [1]
    assert [len(item) for item in Widths(CONFIG, TARGETS["portable"], {}).items] == [1] * 9


@pytest.mark.parametrize("built", [True, False])
def test_by_default_the_widths_are_those_of_native_operators(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    monkeypatch.setattr(recipe_module, "library", lambda: Path("library") if built else None)
    kind = "native" if built else "stock"
    widths = Widths(CONFIG, CPU, {})
    assert widths.recipes == Widths(CONFIG, CPU, {"operators": kind}).recipes
    assert {recipe.operators for recipe in widths.recipes.values()} == {kind}
    # of int8 alone native operators would take it, and so have no choice
    options: dict[str, Any] = {"store": {"*.gate_up_proj.3": "int8"}}
    assert widths_of("native", options) == [8]
    for each in (options, {"rounding": "rtn"}, {"kv_cache": "int4"}):
        assert widths_of(None, each) == widths_of("stock", each)
        assert {recipe.operators for recipe in Widths(CONFIG, CPU, each).recipes.values()} == {"stock"}


def widths_of(kind: str | None, options: dict[str, Any]) -> list[int]:
    return sorted(Widths(CONFIG, CPU, options | {"operators": kind}).recipes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1.5}, ["--bits is 1.5", "can have 3.37 to 8.61"]),
        ({"bits": 11.0}, ["--bits is 11", "can have 3.37 to 8.61"]),
        ({"fit": 1000}, ["--fit is 1 kB", "the smallest bundle", "kB"]),
        ({"fit": 10**9}, ["--fit is 1 GB", "8 bits throughout", "use --quantize int8"]),
        ({"bits": 4.0, "fit": 10**9}, ["--bits and --fit", "one of them"]),
        ({"bits": 4.0, "quantize": "int4"}, ["--bits chooses the widths", "--quantize int4"]),
        ({"bits": 4.0, "text": "short"}, ["--text: has", "at least 256"]),
        ({"text": TEXT}, ["--text", "neither is given"]),
        ({"bits": 4.0, "task": "feature-extraction"}, ["--task feature-extraction has no --bits"]),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_a_sentence(
    tmp_path: Path, checkpoint: Checkpoint, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ExportError) as error:
        export(checkpoint("longrope-window"), tmp_path / "bundle", operators="native", **options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--fit", "14"], ["--fit", "-3GB"], ["--bits", "few"], ["--bits", "nan"]])
def test_options_that_are_no_numbers_are_named(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(MODEL), *option])
    assert ended.value.code == 2
    assert f"{option[0]}" in capsys.readouterr().err


def test_sizes_are_decimal() -> None:
    assert [parse_size(text) for text in ("14GB", "1.5 MB", "3kB")] == [14 * 10**9, 1_500_000, 3000]
    assert [shown(size) for size in (13_999_999_999, 1_500_000, 12)] == ["14 GB", "1.5 MB", "0.02 kB"]
    assert not check_widths("int4", None, None, None)
