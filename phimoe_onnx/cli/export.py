"""phimoe-export: a PhiMoE checkpoint to an ONNX bundle."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

import phimoe_onnx
from phimoe_onnx.bundle import StoredWeights, read_manifest
from phimoe_onnx.cli._common import run
from phimoe_onnx.errors import ExportError


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = argparse.ArgumentParser(prog="phimoe-export", description=__doc__)
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="the folder of a checkpoint, or a hub id such as microsoft/Phi-tiny-MoE-instruct",
    )
    add("-o", "--output", metavar="DIR", help="the bundle's folder (default: NAME-TARGET-QUANTIZE)")
    add(
        "--plan",
        action="store_true",
        help="write nothing; say what each form, or the one of the other options, would take on disk and in memory, "
        "and whether it is here",
    )
    add(
        "--task",
        metavar="TASK",
        help="text-generation, text-classification or feature-extraction (default: as config.json says)",
    )
    add("--quantize", metavar="FORM", help="none (default), fp16, int8 or int4")
    add(
        "--store",
        action="append",
        default=[],
        metavar="PATTERN=FORM",
        help="a form for the matrices whose names match, on top of --quantize: lm_head.weight=int8, "
        "model.layers.0.*=int8; may be repeated, the last that matches counts",
    )
    add("--target", metavar="TARGET", help="cpu (default), cuda or portable (standard ONNX operators only)")
    add(
        "--operators",
        default="stock",
        metavar="KIND",
        help="what computes with int4 and int8 weights: stock (default; ONNX Runtime's operators, which every program "
        "has) or native (this project's)",
    )
    add(
        "--rounding",
        metavar="NAME",
        help="rtn, to nearest (default of stock operators), or two-level (of native ones; both can compute with it)",
    )
    add(
        "--block-size",
        type=int,
        metavar="N",
        help="how many weights share a scale (default: the largest up to 64 that fits)",
    )
    add(
        "--kv-cache",
        default="none",
        metavar="FORM",
        help="keep keys and values as int8 or int4 (default: none, as computed)",
    )
    add("--dtype", metavar="DTYPE", help="of activations on CUDA: float16 (default) or bfloat16")
    add("--adapter", metavar="FOLDER", help="a LoRA adapter as peft saves it, to merge into the weights")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--token", metavar="TOKEN", help="access token for the hub (default: the one that huggingface_hub finds)")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    return run(_export, parser, argv)


def _export(arguments: argparse.Namespace) -> None:
    store = dict(_pair(each) for each in arguments.store)
    if arguments.plan:
        from phimoe_onnx.cli.plan import show_plan

        show_plan(arguments, store)
        return
    export = phimoe_onnx.export  # first: it says what is missing where a package is
    start = time.monotonic()
    with Phases() as phases:
        folder = export(
            arguments.source,
            arguments.output,
            task=arguments.task,
            quantize=arguments.quantize or "none",
            target=arguments.target or "cpu",
            block_size=arguments.block_size,
            kv_cache=arguments.kv_cache,
            dtype=arguments.dtype,
            store=store,
            operators=arguments.operators,
            rounding=arguments.rounding,
            adapter=arguments.adapter,
            revision=arguments.revision,
            token=arguments.token,
            overwrite=arguments.overwrite,
            progress=phases,
        )
    print(f"{folder}: {_size(folder) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    _summarise(folder, phases.seconds)
    print(_who_runs_it(folder))


def _pair(text: str) -> tuple[str, str]:
    pattern, found, form = text.rpartition("=")
    if not found or not pattern:
        raise ExportError(f"--store {text}: expected PATTERN=FORM, such as lm_head.weight=int8")
    return pattern, form


def _who_runs_it(folder: Path) -> str:
    """Which operators a bundle has, who can run it, and how to get the other kind."""
    manifest = read_manifest(folder)
    if any(graph.requires for graph in manifest.graphs):
        return (
            "native operators: programs that have the library of phimoe-onnx run it; --operators stock writes one for "
            "plain ONNX Runtime"
        )
    if manifest.target == "cpu" and any(group.block_size for group in manifest.weights):
        return "stock operators: any ONNX Runtime runs it; --operators native writes one for this package"
    return "standard and ONNX Runtime's operators: any ONNX Runtime runs it"


class Phases:
    """Shows the phases of an export as they go, with a bar for each, and keeps the seconds that each took."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(file=sys.stderr)
        self.seconds: dict[str, float] = {}
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("reading", total=None)
        self._now, self._start = "", time.monotonic()

    def __enter__(self) -> Phases:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._bar.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Takes a report of progress."""
        if phase != self._now:
            self._end()
            self._now, self._start = phase, time.monotonic()
            self._bar.remove_task(self._task)  # a task's rate is its own phase's
            self._task = self._bar.add_task(phase, total=total or None)
        self._bar.update(self._task, completed=done, total=total or None)

    def _end(self) -> None:
        if self._now:
            self.seconds[self._now] = time.monotonic() - self._start


def _summarise(folder: Path, seconds: dict[str, float]) -> None:
    """Prints sizes by kind of weight, times by phase and the peak of memory."""
    from phimoe_onnx.exporter.kinds import kind, stored_sizes

    forms: dict[str, dict[str, None]] = {}  # of each kind, in order
    for group in read_manifest(folder).weights:
        for name in group.names():
            if not name.endswith(".bias"):
                forms.setdefault(kind(name), {})[_stored_as(group)] = None
    sizes = stored_sizes(folder)
    table = Table("weights", "stored as", "MB", "share", box=None, header_style="")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, size in sizes.items():
        stored = "; ".join(forms.get(name, ()))
        table.add_row(name, stored, f"{size / 1e6:.2f}", f"{size / sum(sizes.values()):.1%}")
    Console().print(table)
    print(", ".join(f"{phase} {time:.1f} s" for phase, time in seconds.items()) + _peak_memory())


def _stored_as(group: StoredWeights) -> str:
    if group.block_size is None:
        return group.dtype
    if group.layout == "strips":
        return f"{group.dtype} in strips"
    return f"{group.dtype}, block {group.block_size}" + ("" if group.symmetric else ", zero points")


def _peak_memory() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
