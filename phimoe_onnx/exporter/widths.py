"""`--bits` and `--fit`: a width for each kind of matrix in each layer, within an average or a size.

What may be chosen follows from the target and its operators: each place's form at each width is the one of a recipe
that has that width throughout. quantize/measure.py says what each costs, quantize/allocate.py chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.places import Place, places
from phimoe_onnx.exporter.quantize.allocate import Choice, allocate
from phimoe_onnx.exporter.quantize.measure import measure, steps
from phimoe_onnx.exporter.recipe import (
    CALIBRATED,
    INTEGERS,
    MIXED,
    Recipe,
    default_operators,
    default_rounding,
    recipe_for,
)
from phimoe_onnx.exporter.sizes import average_bits, count_weights, shown, stored_bytes, weight_bytes
from phimoe_onnx.exporter.target import Target
from phimoe_onnx.exporter.tokenizer import tokenizer_files
from phimoe_onnx.layered import Read, checkpoint_weights
from phimoe_onnx.progress import Progress

WIDTHS = (2, 3, 4, 8)
PASSAGE = Path(__file__).with_name("passage.txt")
TOKENS, WINDOW = 1024, 256  # of the text, and of a piece of it


class Widths:
    """The choices that there are for a checkpoint, and what each takes and costs.

    Args:
        config: the checkpoint's shape.
        target: what the bundle is for.
        options: those of `recipe_for`, but for `quantize`; what `store` fixes stays so.

    Raises:
        ExportError: as for `recipe_for`, or the task is none that writes text.
    """

    def __init__(self, config: PhiMoEConfig, target: Target, options: Mapping[str, Any]) -> None:
        if options.get("task", "text-generation") != "text-generation":
            raise ExportError(
                f"--task {options['task']} has no --bits and --fit: what a width costs is measured by the tokens that "
                f"a model expects; use --quantize and --store"
            )
        self.config, self.target, self.options = config, target, dict(options)
        operators = self.options.pop("operators", None)
        if operators is None:
            operators, _ = default_operators(config, target, INTEGERS, **self.options)
        self.options["operators"] = operators
        if not (options.get("rounding") or options.get("calibrate")):  # int8 alone would have another than int4
            self.options["rounding"] = default_rounding(target, operators, INTEGERS)
        self.recipes: dict[int, Recipe] = {}
        refused = None
        for bits in WIDTHS:  # those that these options allow
            try:
                recipe = recipe_for(config, target, f"int{bits}", **self.options)
            except ExportError as error:
                refused = error
                continue
            # what a calibration rounds is not known yet; that of the same grid, which looks at no text, is
            self.recipes[bits] = replace(recipe, rounding="two-level") if recipe.rounding == CALIBRATED else recipe
        if refused is not None and not self.recipes:
            raise refused
        self.items = self._items()
        self.costs: dict[Place, dict[int, float]] = {}

    def smallest(self) -> Recipe:
        """The fewest bits throughout."""
        return self.recipes[min(self.recipes)]

    def largest(self) -> Recipe:
        """The most bits throughout."""
        return self.recipes[max(self.recipes)]

    def measure(self, read: Read, text: str, folder: Path, report: Progress) -> None:
        """Measures what each choice costs on a text; `folder` has the checkpoint's tokenizer.

        Raises:
            ExportError: the text is too short.
        """
        total, done = 4 * count_weights(self.config, self.smallest()), 0  # in float32

        def step() -> None:
            nonlocal done
            done += 1
            report("measuring widths", total * done // steps(self.config), total)

        self.costs = measure(self.config, read, self.recipes, cut(text, folder, self.config), step=step)

    def within(self, nbytes: int) -> Recipe:
        """The recipe of the least cost whose weights take at most so many bytes.

        Raises:
            ValueError: there is none.
        """
        spent = self._bytes_but(nbytes)
        choices = [self._choices(item) for item in self.items]
        chosen = allocate(choices, spent)
        widths = sorted(self.recipes)
        store = {
            name: f"int{widths[choice]}"
            for item, choice in zip(self.items, chosen, strict=True)
            for place in item
            for name in place.parameters()
        }
        options = self.options | {"store": store | dict(self.options.get("store") or {})}
        recipe = recipe_for(self.config, self.target, f"int{widths[-1]}", **options)
        return replace(recipe, quantize=MIXED)

    def _items(self) -> list[tuple[Place, ...]]:
        """Places that are stored alike: of fused experts gate, up and down of a layer."""
        together = "fused" in self.target.experts and self.smallest().operators == "stock"
        items: list[tuple[Place, ...]] = []
        for place in places(self.config):
            if together and place.kind == "down":
                items[-1] = (*items[-1], place)
            else:
                items.append((place,))
        return [item for item in items if len({self._forms(item, bits) for bits in self.recipes}) > 1]

    def _forms(self, item: tuple[Place, ...], bits: int) -> tuple[Any, ...]:
        return tuple(self.recipes[bits].forms[name] for place in item for name in place.parameters())

    def _choices(self, item: tuple[Place, ...]) -> list[Choice]:
        """By width, the fewest bits first."""
        return [
            Choice(
                sum(stored_bytes(self.config, recipe, name) for place in item for name in place.parameters()),
                sum(self.costs[place][bits] for place in item),
            )
            for bits, recipe in sorted(self.recipes.items())
        ]

    def _bytes_but(self, nbytes: int) -> int:
        """What is left of some bytes for the items, when all else has its own."""
        names = {name for item in self.items for place in item for name in place.parameters()}
        fixed = [name for name in self.smallest().forms if name not in names]
        return nbytes - sum(stored_bytes(self.config, self.smallest(), name) for name in fixed)


def check_widths(quantize: str, bits: float | None, fit: int | None, text: str | None) -> bool:
    """Whether widths are to be chosen.

    Raises:
        ExportError: these options do not go together.
    """
    if bits is None and fit is None:
        if text is not None:
            raise ExportError("--text is what --bits and --fit measure widths on, and neither is given; leave it out")
        return False
    option = "--fit" if bits is None else "--bits"
    if bits is not None and fit is not None:
        raise ExportError("--bits and --fit both choose the widths; give one of them")
    if quantize != "none":
        raise ExportError(f"{option} chooses the widths, and so does --quantize {quantize}; give one of them")
    return True


def chosen_recipe(
    widths: Widths,
    bits: float | None,
    fit: int | None,
    text: str | None,
    rows: Mapping[str, tuple[Rows, ...]],
    folder: Path,
    size: Callable[[Recipe], int],
    report: Progress,
) -> Recipe:
    """The recipe of `--bits` or `--fit`; see `with_bits` and `with_size`."""

    def measured() -> None:
        read = checkpoint_weights(widths.config, dict(rows))
        widths.measure(read, PASSAGE.read_text(encoding="utf-8") if text is None else text, folder, report)

    if bits is not None:
        return with_bits(widths, bits, measured)
    assert fit is not None
    return with_size(widths, fit, size, measured)


def with_bits(widths: Widths, bits: float, measured: Callable[[], None]) -> Recipe:
    """The best recipe of at most so many bits a weight on average; `measured` is called when it is known that there is
    one.

    Raises:
        ExportError: there is none, or none that has so many.
    """
    least, most = (average_bits(widths.config, recipe) for recipe in (widths.smallest(), widths.largest()))
    if not least <= bits <= most:
        lowest, highest = math.ceil(100 * least) / 100, math.floor(100 * most) / 100
        raise ExportError(f"--bits is {bits:g}, but with these options a bundle can have {lowest:g} to {highest:g}")
    measured()
    return widths.within(int(bits * count_weights(widths.config, widths.smallest()) / 8))


def with_size(widths: Widths, nbytes: int, size: Callable[[Recipe], int], measured: Callable[[], None]) -> Recipe:
    """The best recipe whose bundle has at most so many bytes on disk.

    Args:
        widths: the choices.
        nbytes: what there is.
        size: how many bytes the bundle of a recipe has.
        measured: as for `with_bits`.

    Raises:
        ExportError: there is none, or none that is so large.
    """
    least, most = size(replace(widths.smallest(), quantize=MIXED)), size(replace(widths.largest(), quantize=MIXED))
    if not least <= nbytes:
        raise ExportError(f"--fit is {shown(nbytes)}, but the smallest bundle with these options has {shown(least)}")
    if nbytes >= most:
        raise ExportError(
            f"--fit is {shown(nbytes)}, but with {max(widths.recipes)} bits throughout a bundle has {shown(most)}; "
            f"use --quantize int{max(widths.recipes)}"
        )
    measured()
    weights = nbytes - (least - weight_bytes(widths.config, widths.smallest()))
    while True:  # a manifest of more forms is longer
        try:
            recipe = widths.within(weights)
        except ValueError:
            return widths.within(weight_bytes(widths.config, widths.smallest()))
        over = size(recipe) - nbytes
        if over <= 0:
            return recipe
        weights -= over


def cut(text: str, folder: Path, config: PhiMoEConfig) -> Sequence[Sequence[int]]:
    """The first tokens of a text, in windows.

    Raises:
        ExportError: there are too few.
    """
    source = tokenizer_files(folder).get("tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_str(source or (folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    token_ids = [token for token in tokenizer.encode(text).ids if token < config.vocab_size][:TOKENS]
    if len(token_ids) < WINDOW:
        raise ExportError(f"--text: has {len(token_ids)} tokens, at least {WINDOW} are needed to measure widths")
    size = min(WINDOW, config.max_position_embeddings)
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
