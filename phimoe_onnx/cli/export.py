"""phimoe-export: a PhiMoE checkpoint to an ONNX bundle."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

import phimoe_onnx
from phimoe_onnx.bundle import MANIFEST, NATIVE_OPERATORS, TASKS, Manifest, StoredWeights, read_manifest
from phimoe_onnx.cli._common import Parser, run
from phimoe_onnx.cli._start import imports
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.plan import CALIBRATION_TOKENS
from phimoe_onnx.exporter.recipe import BLOCK_SIZES, CALIBRATED, KV_CACHE, QUANTIZE, ROUNDINGS, default_rounding
from phimoe_onnx.exporter.sizes import parse_size
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.memory import peak_memory

OPERATORS = tuple(dict.fromkeys(each for target in TARGETS.values() for each in target.operators))
FOR_BUNDLES = {"source", "output", "operators", "block_size", "overwrite"}  # options that make sense for them
NATIVE_ANEW = "--operators native writes one, from the checkpoint,"
DTYPES = tuple(dict.fromkeys(dtype for target in TARGETS.values() for dtype in target.dtypes))


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    parser = Parser(
        "phimoe-export",
        "Turn a PhiMoE checkpoint into an ONNX bundle: a folder with everything that a program needs to run the model.",
        "microsoft/Phi-tiny-MoE-instruct --quantize int4",
        "CHECKPOINT -o bundle --quantize int4 --operators stock",
        "CHECKPOINT -o bundle --quantize int4 --store lm_head.weight=int8",
        "models/phimoe-austen --plan",
        "bundle -o bundle-stock --operators stock",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="the folder of a checkpoint, or a hub id such as microsoft/Phi-tiny-MoE-instruct; or the folder of a "
        "bundle, whose operators become the other kind",
    )
    add("-o", "--output", metavar="DIR", help="the bundle's folder (default: NAME-TARGET-QUANTIZE, or NAME-OPERATORS)")
    add(
        "--plan",
        action="store_true",
        help="write nothing; say what each form, or the one of the other options, would take on disk and in memory, "
        "and whether it is here",
    )
    add("--task", choices=TASKS, metavar="TASK", help=f"{', '.join(TASKS)} (default: as config.json says)")
    add("--quantize", choices=QUANTIZE, help="how weights are stored (default: none, which is float32 for the CPU)")
    add(
        "--bits",
        type=_bits,
        metavar="NUMBER",
        help="in place of --quantize: so many bits a weight on average, all parameters and their scales counted; each "
        "kind of matrix of each layer gets the width that serves the whole best, which is measured first "
        "(default: none)",
    )
    add(
        "--fit",
        type=_size_of,
        metavar="SIZE",
        help="in place of --quantize: the same, so that the bundle's files are at most so large together, such as 14GB "
        "(default: none)",
    )
    add(
        "--text", metavar="FILE", help="UTF-8 text that --bits and --fit measure on (default: a passage of the package)"
    )
    add(
        "--store",
        action="append",
        type=_pair,
        default=[],
        metavar="PATTERN=FORM",
        help="a form for the matrices whose names match, on top of --quantize: lm_head.weight=int8, "
        "model.layers.0.*=int8; may be repeated, the last that matches counts (default: none)",
    )
    add("--target", choices=TARGETS, help="what the bundle is for; portable is standard ONNX alone (default: cpu)")
    add(
        "--operators",
        choices=OPERATORS,
        help="what computes with weights in integers: ONNX Runtime's operators, which every program has, or native "
        "ones, this project's own, which need its library (default: native for the CPU where the library is here and "
        "they take the other options, else stock; for a bundle, the kind that it has not)",
    )
    add(
        "--rounding",
        choices=ROUNDINGS,
        help="rtn, to nearest, or two-level, on the native operators' grid, which both kinds compute with (default: "
        "two-level with native operators and for int4 on the CPU, else rtn)",
    )
    add(
        "--calibrate",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="round integer weights for what they are given when the model reads a text: the UTF-8 text in FILE, "
        "or without FILE one that comes with the package; minutes for small models, hours for large ones, and a killed "
        "export goes on where it was (default: no)",
    )
    add(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"how much --calibrate reads, spread over the text (default: {CALIBRATION_TOKENS})",
    )
    add(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help="how many weights share a scale (default: the largest up to 64 that fits, with two-level up to 32)",
    )
    add(
        "--kv-cache",
        choices=KV_CACHE,
        default="none",
        help="how keys and values are kept, fp16 by native operators alone (default: none, as computed)",
    )
    add("--dtype", choices=DTYPES, help="of activations (default: float32, on CUDA float16)")
    add(
        "--adapter", metavar="FOLDER", help="a LoRA adapter as peft saves it, to merge into the weights (default: none)"
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)")
    add("--token", metavar="TOKEN", help="access token for the hub (default: the one that huggingface_hub finds)")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    return run(_export, parser, argv)


def _export(arguments: argparse.Namespace) -> None:
    store = dict(arguments.store)
    if _is_bundle(Path(arguments.source)):
        _convert(arguments)
        return
    text = None if arguments.text is None else _read(arguments.text)
    if arguments.plan:
        with imports():
            from phimoe_onnx.cli.plan import show_plan
        show_plan(arguments, store, text, Phases())
        return
    with imports():
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
            calibrate=arguments.calibrate,
            calibration_tokens=arguments.calibration_tokens,
            adapter=arguments.adapter,
            revision=arguments.revision,
            token=arguments.token,
            overwrite=arguments.overwrite,
            bits=arguments.bits,
            fit=arguments.fit,
            text=text,
            progress=phases,
        )
    _report(folder, start, phases.seconds)
    print(_who_runs_it(folder, CALIBRATED if arguments.calibrate else arguments.rounding))


def _is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and not any(folder.glob("*.safetensors"))


def _other_operators(bundle: Path) -> str:
    """The kind that a bundle has not."""
    native = any(NATIVE_OPERATORS in graph.requires for graph in read_manifest(bundle).graphs)
    return "stock" if native else "native"


def _convert(arguments: argparse.Namespace) -> None:
    """A bundle for other operators."""
    others = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if name not in FOR_BUNDLES and value not in (None, False, [], "none")
    ]
    if others:
        raise ExportError(
            f"{', '.join(others)}: is for checkpoints, but {arguments.source} is a bundle, which keeps all but its "
            f"operators; leave it out, or give the checkpoint"
        )
    with imports():
        convert = phimoe_onnx.convert
    start = time.monotonic()
    with Phases() as phases:
        folder = convert(
            arguments.source,
            arguments.output,
            operators=arguments.operators or _other_operators(Path(arguments.source)),
            block_size=arguments.block_size,
            overwrite=arguments.overwrite,
            progress=phases,
        )
    _report(folder, start, phases.seconds)
    print(_who_runs_it(folder, "two-level"))


def _report(folder: Path, start: float, seconds: dict[str, float]) -> None:
    print(f"{folder}: {_size(folder) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    _summarise(folder, seconds)


def _pair(text: str) -> tuple[str, str]:
    pattern, found, form = text.rpartition("=")
    if not found or not pattern:
        raise argparse.ArgumentTypeError(f"{text}: expected PATTERN=FORM, such as lm_head.weight=int8")
    if form not in QUANTIZE:
        raise argparse.ArgumentTypeError(f"{text}: the form is {form!r}, expected one of {', '.join(QUANTIZE)}")
    return pattern, form


def _bits(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not math.isfinite(bits):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; expected bits a weight, such as 3.2")
    return bits


def _size_of(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ExportError(f"--text {file}: cannot be read ({error})") from None


def _who_runs_it(folder: Path, rounding: str | None) -> str:
    """Which operators a bundle has, who can run it, and how to get the other kind: from it where its rounding, None for
    the default one, is on the grid of both.
    """
    from phimoe_onnx.exporter.convert import converted_recipe  # needs torch, which is there by now

    manifest = read_manifest(folder)
    if any(graph.requires for graph in manifest.graphs):
        try:
            converted_recipe(folder, manifest, read_config(folder), "stock")
            other = f"phimoe-export {folder} --operators stock makes one of it for plain ONNX Runtime"
        except ExportError:  # such as int3
            other = "plain ONNX Runtime takes no such weights or cache: export the checkpoint with --operators stock"
        return f"native operators: programs that have the library of phimoe-onnx run it; {other}"
    if manifest.target == "cpu" and any(group.block_size for group in manifest.weights):
        forms = {group.dtype for group in manifest.weights}
        rounding = rounding or default_rounding(TARGETS[manifest.target], "stock", forms)
        converted = rounding != "rtn" and "int2" not in forms
        other = f"phimoe-export {folder} --operators native makes one of it" if converted else NATIVE_ANEW
        return f"stock operators: any ONNX Runtime runs it; {other} for this package"
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
        """Takes a report of progress; behind a colon a phase says where it is."""
        name = phase.partition(":")[0]
        if name != self._now:
            self._end()
            self._now, self._start = name, time.monotonic()
            self._bar.remove_task(self._task)  # a task's rate is its own phase's
            self._task = self._bar.add_task(phase, total=total or None)
        self._bar.update(self._task, description=phase, completed=done, total=total or None)

    def _end(self) -> None:
        if self._now:
            self.seconds[self._now] = time.monotonic() - self._start


def _summarise(folder: Path, seconds: dict[str, float]) -> None:
    """Prints sizes by kind of weight, why there are no chat strings, times by phase and the peak of memory."""
    from phimoe_onnx.exporter.kinds import kind, stored_sizes

    manifest = read_manifest(folder)
    forms: dict[str, dict[str, None]] = {}  # of each kind, in order
    for group in manifest.weights:
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
    if note := _chat_note(folder, manifest):
        print(note)
    peak = peak_memory()
    memory = "" if peak is None else f"; peak memory {peak / 2**30:.2f} GiB"
    print(", ".join(f"{phase} {time:.1f} s" for phase, time in seconds.items()) + memory)


def _stored_as(group: StoredWeights) -> str:
    if group.block_size is None:
        return group.dtype
    if group.layout == "strips":
        return f"{group.dtype} in strips"
    return f"{group.dtype}, block {group.block_size}" + ("" if group.symmetric else ", zero points")


def _chat_note(folder: Path, manifest: Manifest) -> str | None:
    """Why the manifest has no chat strings, where it has none."""
    if manifest.task != "text-generation" or manifest.chat is not None:
        return None
    from phimoe_onnx.exporter.manifest.chat_format import why_no_format

    return f"no chat strings in {MANIFEST}, which readers without Jinja need: {why_no_format(folder)}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    sys.exit(main())
