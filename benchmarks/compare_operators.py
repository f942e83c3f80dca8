"""Native operators against ONNX Runtime's, on one int4 model: eight layers of Phi-mini-MoE's shape, random weights.

    python benchmarks/compare_operators.py --folder FOLDER  # some ten minutes on two cores, 9 GB of disk

Each bundle is loaded in a process of its own, and the processes take turns; before every turn the memory's read
bandwidth is measured. Figures are medians of the rounds with lowest and highest. "Of the limit" is a turn's decode
speed over bandwidth / (bytes that a step reads, its cache counted).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shapes import write_checkpoint
from threads import occupied

from phimoe_onnx.bench.traffic import read_bandwidth, step_bytes
from phimoe_onnx.bundle import read_manifest

BUNDLES = {"stock": {"operators": "stock", "rounding": "rtn"}, "native": {"operators": "native"}}


def serve(bundle: str, context: int, new_tokens: int) -> None:
    """A bundle's process: how it loaded, then for every line of standard input the two speeds, as lines of JSON."""
    from phimoe_onnx.runtime.model import PhiMoE

    start = time.perf_counter()
    model = PhiMoE.load(bundle)
    model.eos = frozenset()
    loaded = time.perf_counter()
    model.generate([5], max_new_tokens=1)
    first = time.perf_counter()
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert anonymous
    print(json.dumps({"load": first - start, "of it load()": loaded - start, "anonymous": int(anonymous[1]) * 1024}))
    sys.stdout.flush()
    prompt = [3 + 7 * place % 30000 for place in range(context)]
    for _ in sys.stdin:
        generation = model.generate(prompt, max_new_tokens=new_tokens, speculate=False)
        speeds = {"prefill": context / generation.first_token_seconds, "decode": generation.tokens_per_second}
        print(json.dumps(speeds), flush=True)


def start(bundle: Path, context: int, new_tokens: int) -> subprocess.Popen[str]:
    """A bundle's process."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import compare_operators as it; "
        f"it.serve({str(bundle)!r}, {context}, {new_tokens})"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], ask: bool = True) -> dict[str, float]:
    """The next line of a process, after one to it."""
    assert process.stdin
    assert process.stdout
    if ask:
        process.stdin.write("\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit("a bundle's process has ended; see above")
    found: dict[str, float] = json.loads(line)
    return found


def make(folder: Path, layers: int) -> dict[str, Path]:
    """The bundles, where `folder` has them not already."""
    from phimoe_onnx import export

    checkpoint = folder / "checkpoint"
    bundles = {name: folder / name for name in BUNDLES}
    missing = {name: bundle for name, bundle in bundles.items() if not bundle.exists()}
    if missing:
        write_checkpoint(checkpoint, "Phi-mini-MoE", layers, random_layers=layers)
    for name, bundle in missing.items():
        begun = time.perf_counter()
        export(checkpoint, bundle, quantize="int4", **BUNDLES[name])  # type: ignore[arg-type]
        print(f"{name}: exported in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if missing:
        shutil.rmtree(checkpoint)
    return bundles


def compare(bundles: dict[str, Path], rounds: int, context: int, new_tokens: int, condition: str) -> None:
    """Prints the table of one condition."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in bundles}
    with ExitStack() as stack:
        processes = {}
        for name, bundle in bundles.items():
            processes[name] = stack.enter_context(start(bundle, context, new_tokens))
            stack.callback(processes[name].terminate)
            for what, value in answer(processes[name], ask=False).items():
                found[name][what] = [value]
            answer(processes[name])  # warms up
        with occupied(condition):
            for number in range(rounds):
                for name, process in processes.items():
                    time.sleep(0.6)
                    bandwidth = read_bandwidth() if condition == "idle" else 0.0
                    turn = answer(process)
                    step = step_bytes(bundles[name], read_manifest(bundles[name]), 1, context + new_tokens // 2)
                    turn["share"] = turn["decode"] * step / bandwidth if bandwidth else 0.0
                    turn["bandwidth"] = bandwidth / 1e9
                    for what, value in turn.items():
                        found[name].setdefault(what, []).append(value)
                print(f"{condition}: round {number + 1} of {rounds}", file=sys.stderr)
    print(f"\n{condition}: prompts of {context} tokens, {new_tokens} new ones, {rounds} rounds\n")
    columns = ("prefill", "decode", "share", "bandwidth", "load", "of it load()", "anonymous")
    names = (
        "| operators | prefill, tokens/s | decode, tokens/s | of the limit | read, GB/s | load and first token, s | "
    )
    print(names + "load(), s | anonymous memory, MB |\n" + "|---" * 8 + "|")
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(cell(what, values[what]) for what in columns) + " |")


def cell(what: str, values: list[float]) -> str:
    """A median with its spread."""
    scale: Any = {"anonymous": 1e-6, "share": 100}.get(what, 1)
    text = f"{statistics.median(values) * scale:.3g}" + (" %" if what == "share" else "")
    return text if len(values) == 1 else f"{text} ({min(values) * scale:.3g} to {max(values) * scale:.3g})"


def main() -> None:
    """Makes the bundles and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the bundles are made and kept")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--make", action="store_true", help="make the bundles, and no more")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bundles = make(arguments.folder, arguments.layers)
    if not arguments.make:
        for condition in ("idle", "one core occupied"):
            compare(bundles, arguments.rounds, arguments.context, arguments.new_tokens, condition)


if __name__ == "__main__":
    main()
