"""Verifies bundles of full-width checkpoints of several depths and prints the time and the peaks of memory: that of the
bundle, and that of PyTorch, which does not grow with the model.

python benchmarks/verify_memory.py --shape Phi-3.5-MoE --layers 1 2

The first layer is noise, the others are zeros that take no disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import SHAPES, write_checkpoint

VERIFY = """
import json, sys, time
from pathlib import Path
from phimoe_onnx import verify
from phimoe_onnx.parity.thresholds import Thresholds

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def progress(what, done, total):
    name = what.partition(",")[0]
    if name not in begun:
        begun[name] = time.monotonic()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; proc(5)
    peaks[name] = peak()

begun, peaks = {}, {}
verify(*sys.argv[1:3], tokens=int(sys.argv[3]), thresholds=Thresholds(), save_golden=sys.argv[4], progress=progress)
peaks[list(peaks)[-1]] = peak()
begun["end"] = time.monotonic()
print(json.dumps([peaks, begun]))
"""


def main() -> None:
    """Prints a Markdown table, a row for each depth and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Phi-3.5-MoE")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quantize", nargs="+", default=["int4"])
    parser.add_argument("--operators", choices=("stock", "native"), default="native")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    print("| checkpoint | layers | parameters, B | stored as | what | s | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for layers in arguments.layers:
        count = write_checkpoint(folder / "source", arguments.shape, layers, random_layers=1)
        for quantize in arguments.quantize:
            _row(folder, arguments, layers, count, quantize)
            shutil.rmtree(folder / "bundle")
        shutil.rmtree(folder / "source")
    shutil.rmtree(folder)


def _row(folder: Path, arguments: argparse.Namespace, layers: int, count: int, quantize: str) -> None:
    from phimoe_onnx import export

    export(folder / "source", folder / "bundle", quantize=quantize, operators=arguments.operators)
    command = [sys.executable, "-c", VERIFY, str(folder / "bundle"), str(folder / "source"), str(arguments.tokens)]
    done = subprocess.run([*command, str(folder / "golden")], stdout=subprocess.PIPE, text=True, check=True)
    peaks, begun = json.loads(done.stdout)
    times = list(begun.values())
    for name, begin, end in zip(peaks, times[:-1], times[1:], strict=True):
        peak, model = peaks[name] / 2**30, f"{arguments.shape} | {layers} | {count / 1e9:.2f} | {quantize}"
        print(f"| {model} | {name} | {end - begin:.0f} | {peak:.2f} |", flush=True)
    print(f"the golden file has {(folder / 'golden').stat().st_size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
