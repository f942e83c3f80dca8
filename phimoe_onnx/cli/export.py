"""phimoe-export: a PhiMoE checkpoint to an ONNX bundle."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import phimoe_onnx
from phimoe_onnx.cli._common import run


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = argparse.ArgumentParser(prog="phimoe-export", description=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the folder of a checkpoint, or a hub id such as microsoft/Phi-tiny-MoE-instruct")
    add("-o", "--output", metavar="DIR", help="the bundle's folder (default: NAME-TARGET-QUANTIZE)")
    add("--quantize", default="none", metavar="FORM", help="none (default), fp16, int8 or int4")
    add("--target", default="cpu", metavar="TARGET", help="cpu (default), cuda or portable (standard ONNX operators only)")
    add("--block-size", type=int, default=32, metavar="N", help="how many weights share a scale (default: 32)")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--token", metavar="TOKEN", help="access token for the hub (default: the one that huggingface_hub finds)")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    return run(_export, parser, argv)


def _export(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        folder = phimoe_onnx.export(
            arguments.source,
            arguments.output,
            quantize=arguments.quantize,
            target=arguments.target,
            block_size=arguments.block_size,
            revision=arguments.revision,
            token=arguments.token,
            overwrite=arguments.overwrite,
            progress=lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None),
        )
    print(f"{folder}: {_size(folder) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
