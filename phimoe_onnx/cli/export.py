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
        help="write nothing; say what each form would take on disk and in memory, and whether it is here",
    )
    add(
        "--task",
        metavar="TASK",
        help="text-generation, text-classification or feature-extraction (default: as config.json says)",
    )
    add("--quantize", default="none", metavar="FORM", help="none (default), fp16, int8 or int4")
    add(
        "--target",
        default="cpu",
        metavar="TARGET",
        help="cpu (default), cuda or portable (standard ONNX operators only)",
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
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--token", metavar="TOKEN", help="access token for the hub (default: the one that huggingface_hub finds)")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    return run(_export, parser, argv)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.plan:
        from phimoe_onnx.cli.plan import show_plan

        show_plan(
            arguments.source,
            arguments.output,
            arguments.task,
            arguments.block_size,
            arguments.revision,
            arguments.token,
        )
        return
    start = time.monotonic()
    seconds: dict[str, float] = {}
    phase_start, phase = start, ""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def progress(now: str, done: int, total: int) -> None:
            nonlocal phase, phase_start, task
            if now != phase:
                if phase:
                    seconds[phase] = time.monotonic() - phase_start
                phase, phase_start = now, time.monotonic()
                bar.remove_task(task)  # a task's rate is its own phase's
                task = bar.add_task(now, total=total or None)
            bar.update(task, completed=done, total=total or None)

        folder = phimoe_onnx.export(
            arguments.source,
            arguments.output,
            task=arguments.task,
            quantize=arguments.quantize,
            target=arguments.target,
            block_size=arguments.block_size,
            kv_cache=arguments.kv_cache,
            dtype=arguments.dtype,
            revision=arguments.revision,
            token=arguments.token,
            overwrite=arguments.overwrite,
            progress=progress,
        )
        seconds[phase] = time.monotonic() - phase_start
    print(f"{folder}: {_size(folder) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    _summarise(folder, seconds)


def _summarise(folder: Path, seconds: dict[str, float]) -> None:
    """Prints sizes by kind of weight, times by phase and the peak of memory."""
    from phimoe_onnx.exporter.kinds import kind, stored_sizes

    forms = {kind(name): _stored_as(group) for group in read_manifest(folder).weights for name in group.parameters}
    sizes = stored_sizes(folder)
    table = Table("weights", "stored as", "MB", "share", box=None, header_style="")
    for name in ("MB", "share"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for name, size in sizes.items():
        table.add_row(name, forms.get(name, ""), f"{size / 1e6:.2f}", f"{size / sum(sizes.values()):.1%}")
    Console().print(table)
    print(", ".join(f"{phase} {time:.1f} s" for phase, time in seconds.items()) + _peak_memory())


def _stored_as(group: StoredWeights) -> str:
    return group.dtype if group.block_size is None else f"{group.dtype}, block {group.block_size}"


def _peak_memory() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
