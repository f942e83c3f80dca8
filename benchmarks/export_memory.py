"""Exports full-width checkpoints of several depths and prints the time and the peak of memory: it does not grow with
the model.

python benchmarks/export_memory.py --shape Phi-3.5-MoE --layers 1 8 32 --quantize int4

The first layer is noise, the others are zeros that take no disk; a bundle is written whole and deleted again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from process import measure
from shapes import SHAPES, write_checkpoint

EXPORT = "import sys; from phimoe_onnx.cli.export import main; sys.exit(main())"


def main() -> None:
    """Prints a Markdown table, a row for each depth and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Phi-3.5-MoE")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quantize", nargs="+", default=["int4"])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    print(
        "| checkpoint | layers | parameters, B | stored as | bundle, GB | export, s | M parameters/s | peak memory, "
        "GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for layers in arguments.layers:
        count = write_checkpoint(folder / "source", arguments.shape, layers, random_layers=1)
        for quantize in arguments.quantize:
            options = [str(folder / "source"), "--output", str(folder / "bundle"), "--quantize", quantize]
            options += ["--operators", "stock"]
            seconds, peak, _ = measure([sys.executable, "-c", EXPORT, *options])
            size = sum(path.stat().st_size for path in (folder / "bundle").iterdir())
            speed = count / seconds / 1e6
            print(
                f"| {arguments.shape} | {layers} | {count / 1e9:.2f} | {quantize} | {size / 1e9:.2f} | {seconds:.0f} "
                f"| {speed:.0f} "
                f"| {peak / 2**30:.2f} |",
                flush=True,
            )
            shutil.rmtree(folder / "bundle")
        shutil.rmtree(folder / "source")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
