"""Runs a long prompt through one layer of full width and prints speed and memory, for each form of the cache.

python benchmarks/long_context.py --tokens 32768
python benchmarks/long_context.py --tokens 8192 --kv-cache int8
python benchmarks/long_context.py --operators native --kv-cache none fp16 int8

The prompt is prefilled in chunks. Every bundle is exported here, and run in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from process import measure
from shapes import SHAPES, write_checkpoint

EXPORT = "import sys; from phimoe_onnx.cli.export import main; sys.exit(main())"
STEPS = 32
RUN = """
import json, sys, time
from phimoe_onnx import PhiMoE
model, length, steps = PhiMoE.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
loaded = status("VmRSS")
ids = [3 + 7 * n % 2000 for n in range(length)]
decoder = model.decoder(1, length + steps)
start = time.perf_counter()
decoder.prefill(0, ids)
prefill = time.perf_counter() - start
start = time.perf_counter()
for _ in range(steps):
    decoder.step({0: 5})
decode = time.perf_counter() - start
figures = {"loaded": loaded, "peak": status("VmHWM"), "prefill": length / prefill, "step": 1000 * decode / steps}
print(json.dumps(figures))
"""


def main() -> None:
    """Prints a Markdown table, a row for each form of the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Phi-3.5-MoE")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--kv-cache", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--operators", default="stock")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    write_checkpoint(folder / "source", arguments.shape, layers=1, random_layers=1)
    config = SHAPES[arguments.shape]
    numbers = 2 * config["num_key_value_heads"] * config["head_dim"] * (arguments.tokens + STEPS)
    print("| cache | tokens | cache, MB | prefill, tokens/s | a step at the end, ms | loaded, GiB | peak, GiB |")
    print("|---|---|---|---|---|---|---|")
    for kv_cache in arguments.kv_cache:
        options = ["--output", str(folder / "bundle"), "--quantize", "int4", "--kv-cache", kv_cache]
        options += ["--operators", arguments.operators]
        measure([sys.executable, "-c", EXPORT, str(folder / "source"), *options])
        _, _, output = measure([sys.executable, "-c", RUN, str(folder / "bundle"), str(arguments.tokens), str(STEPS)])
        figures = json.loads(output)
        size = numbers * {"none": 4, "fp16": 2, "int8": 1, "int4": 0.5}[kv_cache]
        print(
            f"| {kv_cache} | {arguments.tokens} | {size / 1e6:.0f} | {figures['prefill']:.0f} | {figures['step']:.1f} "
            f"| {figures['loaded'] / 2**30:.2f} | {figures['peak'] / 2**30:.2f} |",
            flush=True,
        )
        shutil.rmtree(folder / "bundle")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
