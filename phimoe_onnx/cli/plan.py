"""phimoe-export --plan: what an export would take, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from phimoe_onnx.checkpoint.adapter import read_adapter
from phimoe_onnx.checkpoint.source import headers, task_for
from phimoe_onnx.checkpoint.tensors import parameters
from phimoe_onnx.cli._start import imports
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.places import HEAD_KIND, KINDS, places
from phimoe_onnx.exporter.plan import (
    Machine,
    Requirements,
    count_parameters,
    requirements,
    this_machine,
    tokens_to_read,
)
from phimoe_onnx.exporter.recipe import INTEGERS, MIXED, NO_LIBRARY, QUANTIZE, Recipe, default_operators, recipe_for
from phimoe_onnx.exporter.sizes import average_bits, stored_bytes
from phimoe_onnx.exporter.target import TARGETS, Target, target_named
from phimoe_onnx.operators import library
from phimoe_onnx.progress import Progress


def show_plan(
    arguments: argparse.Namespace,
    store: Mapping[str, str],
    text: str | None,
    progress: AbstractContextManager[Progress],
) -> None:
    """Prints the checkpoint's parameters by kind, and a row for each target and form that the options leave; with
    `--bits` and `--fit` the chosen widths of each layer.
    """
    source = arguments.source
    folder, stored = headers(source, arguments.revision, arguments.token)
    config = read_config(folder)
    tokens = tokens_to_read(arguments.calibrate is not False, arguments.calibration_tokens)
    task = task_for(config, arguments.task, source)
    adapter = None if arguments.adapter is None else read_adapter(Path(arguments.adapter))
    parameters(config, stored, task, adapter)  # says what is wrong with the checkpoint
    counts = count_parameters(config, task)
    machine = this_machine(Path(arguments.output or ".").resolve().parent)
    table = _table()
    refused: dict[str, ExportError] = {}
    native: list[str] = []
    lacking = False
    chosen = _chosen(arguments, store, config, task, text, progress)
    for target, quantize in _wanted(arguments, store):
        try:
            options, lacks = _options(arguments, store, config, task, target, quantize)
            recipe = chosen or recipe_for(config, target, quantize, **options)
        except ExportError as error:
            refused[f"{target.name} {quantize}"] = error
            continue
        lacking = lacking or lacks
        if recipe.operators == "native":
            native.append(f"{target.name} {quantize}")
        need = requirements(config, recipe, tokens)
        sizes = (need.bundle, need.export_memory, need.run_memory, 1000 * need.cache_per_token)
        shown = (decimal(size, precision=2) for size in sizes)
        table.add_row(target.name, quantize, *shown, *_verdicts(need, target, machine))
    console = Console(width=140)  # a row stays a line, in a file too
    if refused and not table.rows:
        raise next(iter(refused.values()))
    console.print(f"{source}: {config.family}, {_count(sum(counts.values()))} parameters")
    console.print(", ".join(f"{kind} {count / 1e6:.1f} M" for kind, count in counts.items()))
    for row, reason in refused.items():
        console.print(f"{row}: {reason}", soft_wrap=True)
    if chosen is not None:
        console.print(_layers(config, chosen))
        console.print(f"{average_bits(config, chosen):.3f} bits a weight")
    console.print(table)
    if native:
        console.print(f"with native operators: {', '.join(native)}; --operators stock is without", soft_wrap=True)
    if lacking:
        console.print(NO_LIBRARY, soft_wrap=True)
    gpu = "no NVIDIA GPU" if machine.gpu is None else f"{decimal(machine.gpu)} on the GPU"
    memory = "an unknown amount" if machine.memory is None else decimal(machine.memory)
    console.print(f"free here: {decimal(machine.disk)} of disk, {memory} of memory, {gpu}")


def _count(parameters: int) -> str:
    """With three digits or so: 41.87 B, 4.8 M."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _wanted(arguments: argparse.Namespace, store: Mapping[str, str]) -> Iterator[tuple[Target, str]]:
    """The targets and forms to show: those asked for, else all that differ."""
    if arguments.bits is not None or arguments.fit is not None:
        yield target_named(arguments.target or "cpu"), MIXED
        return
    targets = [target_named(arguments.target)] if arguments.target else list(TARGETS.values())
    for target in targets:
        for quantize in [arguments.quantize] if arguments.quantize else QUANTIZE:
            # half the activations' width, or nothing new
            same = quantize == "fp16" and target.activations(None) != "float32" and not arguments.quantize
            known = target.forms_for(arguments.operators or ("stock" if library() is None else "native"))
            if not same and (quantize in known or arguments.quantize):
                yield target, quantize


def _options(
    arguments: argparse.Namespace,
    store: Mapping[str, str],
    config: PhiMoEConfig,
    task: str,
    target: Target,
    quantize: str,
) -> tuple[dict[str, Any], bool]:
    """Those of `recipe_for`, and whether the operators are stock only because the native ones' library is not here."""
    options = {
        "task": task,
        "block_size": arguments.block_size,
        "kv_cache": arguments.kv_cache,
        "dtype": arguments.dtype,
        "store": store,
        "rounding": arguments.rounding,
        "calibrate": arguments.calibrate is not False,
    }
    operators, lacking = arguments.operators, False
    if operators is None:
        forms = INTEGERS if quantize == MIXED else [quantize]
        operators, lacking = default_operators(config, target, forms, **options)
    return options | {"operators": operators}, lacking


def _chosen(
    arguments: argparse.Namespace,
    store: Mapping[str, str],
    config: PhiMoEConfig,
    task: str,
    text: str | None,
    progress: AbstractContextManager[Progress],
) -> Recipe | None:
    """What `--bits` or `--fit` choose; None without them."""
    if arguments.bits is None and arguments.fit is None and text is None:
        return None
    with imports():  # it reads the weights, and so needs what an export needs
        from phimoe_onnx.exporter.pipeline import plan_widths
        from phimoe_onnx.exporter.widths import Widths, check_widths
    check_widths(arguments.quantize or "none", arguments.bits, arguments.fit, text)
    target = target_named(arguments.target or "cpu")
    options, _ = _options(arguments, store, config, task, target, MIXED)
    widths = Widths(config, target, options)
    with progress as report:
        return plan_widths(
            arguments.source,
            arguments.bits,
            arguments.fit,
            text,
            arguments.adapter,
            arguments.revision,
            arguments.token,
            widths,
            report,
        )


def _layers(config: PhiMoEConfig, recipe: Recipe) -> Table:
    """Of each layer, and of the head, how its matrices are stored and how many bytes they take."""
    table = Table("layer", *KINDS, HEAD_KIND, "size", box=None, header_style="")
    table.columns[-1].justify = "right"
    for layer in range(config.num_hidden_layers + 1):
        found = {place.kind: place for place in places(config) if place.layer == layer}
        forms = (str(recipe.form(found[kind].parameters()[0])) if kind in found else "" for kind in (*KINDS, HEAD_KIND))
        names = [name for place in found.values() for name in place.parameters()]
        size = sum(stored_bytes(config, recipe, name) for name in names)
        table.add_row("" if HEAD_KIND in found else str(layer), *forms, decimal(size, precision=2))
    return table


def _table() -> Table:
    columns = ("target", "quantize", "bundle", "memory to export", "memory to run", "cache a 1,000 tokens")
    table = Table(*columns, box=None, header_style="")
    for column in table.columns[2:]:
        column.justify = "right"
    table.add_column("exports here")
    table.add_column("runs here")
    return table


def _verdicts(need: Requirements, target: Target, machine: Machine) -> tuple[str, str]:
    """Whether this machine can export a form, and run it."""
    memory = machine.memory
    too_little = {
        "disk": need.bundle + need.calibration > machine.disk,
        "memory": memory is not None and need.export_memory > memory,
    }
    lacking = [name for name, lacks in too_little.items() if lacks]
    exports = f"no, too little {' and '.join(lacking)}" if lacking else "yes"
    if memory is None and not lacking:
        exports = "unknown"
    if target.gpu:
        if machine.gpu is None:
            return exports, "no, no GPU"
        memory = machine.gpu
    if memory is None:
        return exports, "unknown"
    return exports, "yes" if need.run_memory <= memory else "no, too little memory"
