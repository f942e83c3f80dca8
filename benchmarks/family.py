"""Exports, loads and runs every checkpoint shape of the family in int4 and prints one table.

python benchmarks/family.py                                    # about a quarter of an hour on two cores, 40 GB of disk
python benchmarks/family.py --checkpoints Phi-tiny-MoE --layers 4

Phi-tiny-MoE and Phi-mini-MoE are complete; GRIN-MoE and Phi-3.5-MoE have as many layers of full width as fit this
machine's memory and disk. All weights are random. Every step is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import psutil
from process import measure
from shapes import SHAPES, write_checkpoint

from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.plan import requirements
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import TARGETS

EXPORT = "import sys; from phimoe_onnx.cli.export import main; sys.exit(main())"
LARGE = ("GRIN-MoE", "Phi-3.5-MoE")
SHARE = 0.75  # of the free memory that a loaded bundle may take
NEW_TOKENS = 33
PARAMETERS_PER_LAYER = 1.3e9  # of the large ones
LOAD = """
import json, sys, time
start = time.perf_counter()
from phimoe_onnx import PhiMoE
imported = time.perf_counter()
model = PhiMoE.load(sys.argv[1])
loaded = time.perf_counter()
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
figures = {"load": loaded - imported, "peak": status("VmHWM"), "resident": status("VmRSS")}
ids = [3 + 7 * n % 2000 for n in range(512)]
start = time.perf_counter()
model.generate(ids, max_new_tokens=1)
figures["prefill"] = 512 / (time.perf_counter() - start)
figures["decode"] = max(model.generate(ids[:16], max_new_tokens=int(sys.argv[2])).tokens_per_second for _ in range(3))
print(json.dumps(figures))
"""


def main() -> None:
    """Prints a Markdown table, a row for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", choices=SHAPES, default=list(reversed(SHAPES)))
    parser.add_argument("--layers", type=int, help="how many layers (default: 32, or what memory allows)")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    columns = (
        "checkpoint", "layers", "parameters, B", "export, s", "export's peak, GiB", "bundle, GB",
        "load, s", "load's peak / bundle",
        "resident, GB", "as planned", "prefill 512, tokens/s", "decode, tokens/s",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for shape in arguments.checkpoints:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        print(row(folder, shape, arguments.layers, arguments.quantize), flush=True)
        shutil.rmtree(folder)


def row(folder: Path, shape: str, layers: int | None, quantize: str) -> str:
    """Measures one checkpoint in `folder`."""
    source, bundle = folder / "source", folder / "bundle"
    layers = layers or fitting_layers(folder / "tiny", shape, quantize)
    count = write_checkpoint(source, shape, layers, random_layers=layers)
    options = ["--output", str(bundle), "--quantize", quantize, "--operators", "stock"]
    seconds, peak, _ = measure([sys.executable, "-c", EXPORT, str(source), *options])
    planned = run_memory(source, quantize)
    shutil.rmtree(source)
    size = sum(path.stat().st_size for path in bundle.iterdir())
    _, _, output = measure([sys.executable, "-c", LOAD, str(bundle), str(NEW_TOKENS)])
    figures = json.loads(output)
    cells = (
        shape, str(layers), f"{count / 1e9:.2f}", f"{seconds:.0f}", f"{peak / 2**30:.2f}", f"{size / 1e9:.2f}",
        f"{figures['load']:.1f}",
        f"{figures['peak'] / size:.2f}", f"{figures['resident'] / 1e9:.2f}", f"{planned / 1e9:.2f}",
        f"{figures['prefill']:.0f}", f"{figures['decode']:.1f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def fitting_layers(folder: Path, shape: str, quantize: str) -> int:
    """32, or for the large ones as many layers as the free memory holds, and the free disk in bf16 and as a bundle."""
    if shape not in LARGE:
        return 32
    one, two = (_planned(folder / str(layers), shape, layers, quantize) for layers in (1, 2))
    by_memory = int((SHARE * psutil.virtual_memory().available - one) / (two - one)) + 1
    by_disk = int(SHARE * psutil.disk_usage(str(folder)).free / (2 * PARAMETERS_PER_LAYER * 1.3))
    return max(1, min(32, by_memory, by_disk))


def _planned(folder: Path, shape: str, layers: int, quantize: str) -> int:
    write_checkpoint(folder, shape, layers, random_layers=0)
    return run_memory(folder, quantize)


def run_memory(source: Path, quantize: str) -> int:
    """Bytes that `phimoe-export --plan` gives for running the checkpoint's bundle."""
    config = read_config(source)
    return requirements(config, recipe_for(config, TARGETS["cpu"], quantize, operators="stock")).run_memory


if __name__ == "__main__":
    main()
