"""Two versions of this package over one checkpoint: load time, memory, tokens/s of one row and of eight uneven rows.

    python -m benchmarks.compare_versions OTHER_CHECKOUT --model models/phimoe-austen --quantize int4 --threads 1

Each version exports a bundle of its own. Then they run in turns, every turn in a process of its own, and must choose
the same tokens. The table has the medians, with the least and the most behind them, and by how much this version
differs from the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent.parent
UNEVEN = (3, 150, 12, 64, 240, 31, 100, 8)  # tokens of the prompts of eight rows
SINGLE = 64
FIGURES = {
    "load": "load, s",
    "resident": "resident after loading, MiB",
    "peak": "peak resident, MiB",
    "prefill": "prefill of one row, tokens/s",
    "one": "one row, tokens/s",
    "eight": "eight uneven rows, tokens/s together",
}


def export(checkpoint: str, folder: str, quantize: str) -> None:
    """A version's own bundle; run with its checkout as PYTHONPATH."""
    import phimoe_onnx

    phimoe_onnx.export(checkpoint, folder, quantize=quantize)


def measure(bundle: str, threads: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """One turn of a version, run with its checkout as PYTHONPATH; the first generation of each kind does not count."""
    import psutil

    from phimoe_onnx import PhiMoE

    start = time.perf_counter()
    model = PhiMoE.load(bundle, threads=threads)
    figures: dict[str, Any] = {"load": time.perf_counter() - start}
    figures["resident"] = psutil.Process().memory_info().rss / 2**20
    prompts = [[300 + (row + place * 7) % 1000 for place in range(length)] for row, length in enumerate(UNEVEN)]
    single = [300 + place * 7 % 1000 for place in range(SINGLE)]
    ones, eights = [], []
    for _ in range(repeats + 1):
        ones.append(model.generate(single, max_new_tokens=new_tokens))
        start = time.perf_counter()
        rows = model.generate(prompts, max_new_tokens=new_tokens)
        eights.append(sum(len(row.token_ids) for row in rows) / (time.perf_counter() - start))
    figures["prefill"] = statistics.median(SINGLE / one.first_token_seconds for one in ones[1:])
    figures["one"] = statistics.median(one.tokens_per_second for one in ones[1:])
    figures["eight"] = statistics.median(eights[1:])
    figures["tokens"] = [ones[-1].token_ids, *(row.token_ids for row in rows)]
    figures["peak"] = peak()
    return figures


def peak() -> float:
    """The most MiB that the process has had, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def call(checkout: Path, function: str, *arguments: object) -> Any:
    """Runs a function of this file with the package of a checkout; what it returns."""
    program = (
        "import json, sys, phimoe_onnx, runpy\n"
        "assert phimoe_onnx.__file__.startswith(sys.argv[1]), phimoe_onnx.__file__\n"
        f"print(json.dumps(runpy.run_path({__file__!r})[{function!r}](*json.loads(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", program, str(checkout), json.dumps(arguments)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {function} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, other: list[float], this: list[float]) -> str:
    """A line of the table."""
    medians = [statistics.median(values) for values in (other, this)]
    cells = [
        f"{median:.4g} ({min(values):.4g} to {max(values):.4g})"
        for median, values in zip(medians, (other, this), strict=True)
    ]
    return f"| {name} | {cells[0]} | {cells[1]} | {100 * (medians[1] / medians[0] - 1):+.1f} % |"


def main() -> None:
    """Exports twice, measures in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--model", type=Path, default=HERE / "models" / "phimoe-austen", help="a checkpoint")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="generations of each kind in a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each version")
    arguments = parser.parse_args()
    checkouts = {"other": arguments.other.resolve(), "this": HERE.resolve()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {name: str(Path(folder) / name) for name in checkouts}
        for name, checkout in checkouts.items():
            call(checkout, "export", str(arguments.model.resolve()), bundles[name], arguments.quantize)
        numbers = (arguments.threads, arguments.new_tokens, arguments.repeats)
        for number in track(range(arguments.rounds), "measuring", console=Console(stderr=True)):
            for name in list(checkouts)[:: 1 if number % 2 == 0 else -1]:  # neither is always the first
                turns[name].append(call(checkouts[name], "measure", bundles[name], *numbers))
    tokens = [turn.pop("tokens") for each in turns.values() for turn in each]
    if any(each != tokens[0] for each in tokens):
        sys.exit("the versions choose different tokens")
    print(f"| | {checkouts['other'].name} | this version | difference |\n|---|---|---|---|")
    for key, name in FIGURES.items():
        print(row(name, *([turn[key] for turn in turns[version]] for version in ("other", "this"))))


if __name__ == "__main__":
    main()
