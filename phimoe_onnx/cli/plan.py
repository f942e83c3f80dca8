"""phimoe-export --plan: what an export would take, before any work."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from phimoe_onnx.checkpoint.source import headers
from phimoe_onnx.checkpoint.tensors import parameters
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.formats import task_for
from phimoe_onnx.exporter.plan import Machine, Requirements, count_parameters, requirements, this_machine

FORMS = (
    ("cpu", "none"),
    ("cpu", "fp16"),
    ("cpu", "int8"),
    ("cpu", "int4"),
    ("portable", "none"),
    ("portable", "fp16"),
    ("cuda", "none"),
    ("cuda", "int8"),
    ("cuda", "int4"),
)


def show_plan(
    source: str, output: str | None, task: str | None, block_size: int | None, revision: str | None, token: str | None
) -> None:
    """Prints the checkpoint's parameters by kind, and a row for each target and form."""
    folder, stored = headers(source, revision, token)
    config = read_config(folder)
    task = task_for(config, task, source)
    rows = parameters(config, stored, task)
    counts = count_parameters(config, rows)
    console = Console(width=140)  # a row stays a line, in a file too
    console.print(f"{source}: {sum(counts.values()) / 1e9:.2f} B parameters")
    console.print(", ".join(f"{kind} {count / 1e6:.1f} M" for kind, count in counts.items()))

    machine = this_machine(Path(output or ".").resolve().parent)
    table = Table(
        "target",
        "quantize",
        "bundle",
        "memory to export",
        "memory to run",
        "cache a 1,000 tokens",
        box=None,
        header_style="",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    table.add_column("exports here")
    table.add_column("runs here")
    for target, quantize in FORMS:
        try:
            need = requirements(config, rows, target, quantize, block_size, task)
        except ExportError as error:
            console.print(f"{target} {quantize}: {error}")
            continue
        sizes = (need.bundle, need.export_memory, need.run_memory, 1000 * need.cache_per_token)
        table.add_row(target, quantize, *(decimal(size, precision=2) for size in sizes), *_verdicts(need, machine))
    console.print(table)
    gpu = "no NVIDIA GPU" if machine.gpu is None else f"{decimal(machine.gpu)} on the GPU"
    console.print(f"free here: {decimal(machine.disk)} of disk, {decimal(machine.memory)} of memory, {gpu}")


def _verdicts(need: Requirements, machine: Machine) -> tuple[str, str]:
    """Whether this machine can export a form, and run it."""
    lacking = [
        name
        for name, lacks in (("disk", need.bundle > machine.disk), ("memory", need.export_memory > machine.memory))
        if lacks
    ]
    exports = f"no, too little {' and '.join(lacking)}" if lacking else "yes"
    if need.target == "cuda" and machine.gpu is None:
        return exports, "no, no GPU"
    memory = machine.gpu if need.target == "cuda" and machine.gpu is not None else machine.memory
    return exports, "yes" if need.run_memory <= memory else "no, too little memory"
