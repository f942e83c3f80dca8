"""How fast prefill and decode are by threads and spinning, on an idle machine and with one core occupied.

    python benchmarks/threads.py --quick  # some five minutes on two cores, 4 GB of disk
    python benchmarks/threads.py          # a quarter of an hour

Two bundles, int4: the small model of this repository, and eight layers of Phi-mini-MoE's shape with random weights.
Each candidate is one process with the bundle loaded, which waits until it is its turn; nothing else runs meanwhile, but
for a process that does nothing but work, where one core is to be occupied. With one thread there is nobody to wait for,
so it has no candidate that spins. Figures are tokens a second: the median of the rounds, how far these lie apart, and
the share of the best of the candidates that are no default. The default is what `PhiMoE.load` does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shapes import write_checkpoint

SMALL = Path(__file__).parent.parent / "models" / "phimoe-austen"
ALLOW, DURATION = "session.intra_op.allow_spinning", "session.intra_op.spin_duration_us"
# by name: threads (0 is all), and what a session is told of spinning; None is the default, under test
CANDIDATES: dict[str, tuple[int, dict[str, str]] | None] = {
    "default": None,
    "1 thread": (1, {}),
    "all, spinning": (0, {}),
    "all, not spinning": (0, {ALLOW: "0"}),
}
PAUSE = 0.6  # seconds: the threads of the candidate before may spin for half a second
PREFILLS = 0.5  # seconds, at least
NEEDED = {"idle": 0.9, "one core occupied": 0.8}  # of the best


def serve(bundle: str, candidate: str, prompt_tokens: int, new_tokens: int) -> None:
    """A candidate's process: for every line of standard input the two speeds, as a line of JSON."""
    from phimoe_onnx.runtime.model import PhiMoE

    chosen = json.loads(candidate)
    model = load(bundle, *chosen) if chosen else PhiMoE.load(bundle)
    prompt = [3 + 7 * place % 2000 for place in range(prompt_tokens)]
    model.eos = frozenset()
    for _ in sys.stdin:
        turns, start = 0, time.perf_counter()
        while time.perf_counter() < start + PREFILLS:
            model.generate(prompt, max_new_tokens=1)
            turns += 1
        prefill = turns * prompt_tokens / (time.perf_counter() - start)
        decode = model.generate(prompt[:16], max_new_tokens=new_tokens).tokens_per_second
        print(json.dumps({"prefill": prefill, "decode": decode}), flush=True)


def load(bundle: str, threads: int, entries: dict[str, str]) -> Any:
    """The bundle in one session with these threads, as ONNX Runtime has them but for the entries."""
    import onnxruntime as ort

    from phimoe_onnx.bundle import read_manifest
    from phimoe_onnx.runtime.model import PhiMoE
    from phimoe_onnx.runtime.ort.session import choose_graph
    from phimoe_onnx.runtime.ort.threads import Sessions
    from phimoe_onnx.text.template import ChatTemplate
    from phimoe_onnx.text.tokenizer import Tokenizer

    folder = Path(bundle)
    manifest = read_manifest(folder)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    graph = folder / choose_graph(manifest, "cpu", ort.__version__).file
    session = ort.InferenceSession(str(graph), options, ["CPUExecutionProvider"])
    tokenizer = Tokenizer(folder, manifest.decoding.hidden_tokens.values())
    return PhiMoE(Sessions(session), manifest, tokenizer, ChatTemplate(folder))


@contextmanager
def candidate_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A candidate's process, until the end of the block."""
    code = "import sys, threads; threads.serve(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    command = [sys.executable, "-c", code, *arguments]
    folder = os.pathsep.join([str(Path(__file__).parent), str(SMALL.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": folder}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def occupied(condition: str) -> Iterator[None]:
    """One core kept busy by a process, if the condition says so."""
    if condition == "idle":
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def ask(process: subprocess.Popen[str]) -> dict[str, float]:
    """One turn of a candidate."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit("a candidate's process has ended; see above")
    speeds: dict[str, float] = json.loads(line)
    return speeds


def measure(name: str, bundle: Path, rounds: int, work: Sequence[int]) -> bool:
    """Prints the table of one bundle; returns whether the default is good enough everywhere."""
    print(f"\n{name}: a prompt of {work[0]} tokens, {work[1]} new ones, {rounds} rounds\n")
    print("| machine | what | candidate | tokens/s | lowest to highest | of the best |\n|---|---|---|---|---|---|")
    good = True
    with ExitStack() as stack:
        processes = {
            candidate: stack.enter_context(candidate_process(str(bundle), json.dumps(chosen), *map(str, work)))
            for candidate, chosen in CANDIDATES.items()
        }
        for process in processes.values():
            ask(process)  # loads, and warms up
        for condition, needed in NEEDED.items():
            found: dict[str, list[dict[str, float]]] = {candidate: [] for candidate in CANDIDATES}
            with occupied(condition):
                for number in range(rounds):
                    for candidate, process in processes.items():
                        time.sleep(PAUSE)
                        found[candidate].append(ask(process))
                    print(f"{name}, {condition}: round {number + 1} of {rounds}", file=sys.stderr)
            for what in ("prefill", "decode"):
                speeds = {candidate: [turn[what] for turn in turns] for candidate, turns in found.items()}
                medians = {candidate: statistics.median(values) for candidate, values in speeds.items()}
                best = max(median for candidate, median in medians.items() if CANDIDATES[candidate])
                for candidate, values in speeds.items():
                    share = medians[candidate] / best
                    spread = f"{min(values):.4g} to {max(values):.4g}"
                    print(f"| {condition} | {what} | {candidate} | {medians[candidate]:.4g} | {spread} | {share:.0%} |")
                good &= medians["default"] >= needed * best
    return good


def make(name: str, folder: Path) -> Path:
    """The bundle, unless `folder` has it already."""
    from phimoe_onnx import export

    bundle = folder / name
    if bundle.exists():
        return bundle
    if name == "small":
        return export(SMALL, bundle, quantize="int4", operators="stock")
    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, "Phi-mini-MoE", 8, random_layers=8)
    export(checkpoint, bundle, quantize="int4", operators="stock")
    shutil.rmtree(checkpoint)
    return bundle


def main() -> None:
    """Makes the bundles and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter texts")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (default: 9, or 5)")
    parser.add_argument("--bundles", nargs="+", choices=["small", "large"], default=["small", "large"])
    parser.add_argument("--folder", type=Path, help="where the bundles are made and kept (default: a temporary folder)")
    parser.add_argument("--spin", nargs="+", type=int, default=[], metavar="US", help="durations to try beside")
    arguments = parser.parse_args()
    for duration in arguments.spin:
        CANDIDATES[f"all, spinning {duration} us"] = (0, {DURATION: str(duration)})
    folder = arguments.folder or Path(tempfile.mkdtemp())
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    titles = {"small": "the small model", "large": "eight layers of Phi-mini-MoE's shape"}
    work = {"small": (224, 400), "large": (128, 24) if arguments.quick else (512, 48)}
    try:
        bundles = {name: make(name, folder) for name in arguments.bundles}
        release, load_before = version("onnxruntime"), os.getloadavg()[0]
        print(f"{platform.machine()}, {os.cpu_count()} processors, ONNX Runtime {release}, load {load_before:.1f}")
        good = [measure(titles[name], bundle, rounds, work[name]) for name, bundle in bundles.items()]
    finally:
        if not arguments.folder:
            shutil.rmtree(folder)
    shares = " and ".join(f"{share:.0%} ({condition})" for condition, share in NEEDED.items())
    print(f"\nThe default reaches {shares} of the best everywhere: {'yes' if all(good) else 'no'}.")


if __name__ == "__main__":
    main()
