"""phimoe-verify of some 42 B parameters in Phi-3.5-MoE's shape, or near it, by a process that may have 16 GB of memory.

    python benchmarks/verify_full_shape.py --folder FOLDER               # 22 GB of disk
    python benchmarks/verify_full_shape.py --folder FOLDER --layers 4    # a small try
    python benchmarks/verify_full_shape.py --folder FOLDER --drawn       # larger_than_memory.py's bundle

The bundle is made in FOLDER if it is not there. The reference is verify()'s own, layer by layer, but its checkpoint is
files of holes, and each tensor is made when it is read: from the trained small model, widened (widened.py), or with
--drawn by the tensor's name (drawn.py). Drawn tensors are the very numbers that the bundle stores: what differs is the
kernels, which round what they multiply to int8, and the embeddings, which the bundle rounds to int8.

The process is in a control group whose memory counts the pages of files as well. "Resident" is VmHWM, with the pages of
the bundle that are mapped; "own" is RssAnon, without them, looked at every fifth of a second. The thresholds are those
of trained models. Drawn weights have more near-ties between experts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import drawn
import widened
from larger_than_memory import GROUPS, let_go, limited
from rich.console import Console

from phimoe_onnx import verify
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint import data
from phimoe_onnx.parity import verify as verifying
from phimoe_onnx.parity.report import show
from phimoe_onnx.parity.stored import is_rounded
from phimoe_onnx.parity.thresholds import default_thresholds

WEIGHTS = {"drawn": drawn, "widened": widened}


class Phases:
    """Time and peaks of memory of each phase, by what verify() says that it does."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._name, self._shown = "", 0.0
        self._begin("hashing the bundle")
        threading.Thread(target=self._watch, daemon=True).start()

    def progress(self, what: str, done: int, total: int) -> None:
        """What verify() calls."""
        name = what.partition(",")[0]
        if name != self._name:
            self.end()
            self._begin(name)
        now = time.monotonic()
        if now > self._shown + 20:
            self._shown = now
            print(f"{now - self._begun:.0f} s: {what}, {done} of {total}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Writes down the phase."""
        phase = self.found[self._name]
        phase["seconds"], phase["resident"] = time.monotonic() - self._begun, _status("VmHWM")

    def _begin(self, name: str) -> None:
        self._name, self._begun = name, time.monotonic()
        self.found[name] = {"own": 0.0}
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; proc(5)

    def _watch(self) -> None:
        while True:
            phase = self.found[self._name]
            phase["own"] = max(phase["own"], _status("RssAnon"))
            time.sleep(0.2)


def _status(name: str) -> float:
    """Bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


def _group_peak() -> float:
    """Bytes that the control group of this process had at the most."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return float((GROUPS / "memory" / path.lstrip("/") / "memory.max_usage_in_bytes").read_text())
    return float((GROUPS / path.lstrip("/") / "memory.peak").read_text())


def run(bundle: str, layers: int, tokens: int, new_tokens: int, source_of: str, alone: bool, out: str) -> None:
    """The limited process: verifies, shows the report and writes it to `out`."""
    phases = Phases()
    limits = default_thresholds(read_manifest(Path(bundle)))
    if alone:
        limits = replace(limits, kernel_kl=None)
    with (
        WEIGHTS[source_of].checkpoint(Path(bundle).parent, layers) as source,
        patch.object(data, "read_tensor", WEIGHTS[source_of].Tensors(source).numbers),
        patch.object(verifying, "is_rounded", lambda manifest: not alone and is_rounded(manifest)),
    ):
        options = {"tokens": tokens, "new_tokens": new_tokens, "thresholds": limits}
        report = verify(bundle, source, progress=phases.progress, **options)  # type: ignore[arg-type]
    phases.end()
    show(report, Console(file=sys.stdout, width=110))
    assert report.evidence is not None
    routing = report.evidence.routing
    used = sum(share > 0 for layer in routing.reference for share in layer)
    print(f"\n{used} of {len(routing.reference) * len(routing.reference[0])} experts are used")
    if routing.agreement is not None:
        print("choices of experts that the stored weights leave unchanged, layer by layer, %:")
        print(*(f"{100 * share:.1f}" for share in routing.agreement))
    print("\n| what | s | own memory, GB | resident, GB |\n|---|---|---|---|")
    for name, phase in phases.found.items():
        print(f"| {name} | {phase['seconds']:.0f} | {phase['own'] / 1e9:.2f} | {phase['resident'] / 1e9:.2f} |")
    print(f"\nThe group's peak, with the files' pages that the system keeps: {_group_peak() / 1e9:.2f} GB")
    Path(out).write_text(json.dumps({"phases": phases.found, "report": report.as_dict()}, default=str))


def main() -> None:
    """Makes the bundle if need be and verifies it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the bundle is made and kept")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=float, default=16, help="GB (10^9 bytes) of memory (default: 16)")
    parser.add_argument("--drawn", action="store_true", help="weights by the tensors' names")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=8, help="of the greedy continuation")
    parser.add_argument(
        "--reference-alone",
        action="store_true",
        help="leave out PyTorch over the stored weights, which with --drawn are the same but for the embeddings",
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source_of = "drawn" if arguments.drawn else "widened"
    name = f"{'phi-3.5' if arguments.drawn else 'widened'}-{arguments.layers}-layers"
    bundle, out = arguments.folder / name, arguments.folder / f"verify-{name}.json"
    if not bundle.exists():
        WEIGHTS[source_of].make(bundle, arguments.layers)
    values = (
        str(bundle),
        arguments.layers,
        arguments.tokens,
        arguments.new_tokens,
        source_of,
        arguments.reference_alone,
        str(out),
    )
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import verify_full_shape as it; it.run(*{values})"
    let_go(list(bundle.iterdir()))  # pages that are there already would count for whoever read or wrote them
    with limited(int(arguments.limit * 1e9)) as enter:
        done = subprocess.run([sys.executable, "-c", code], preexec_fn=enter, check=False)
    if done.returncode:
        sys.exit(f"the limited process ended with {done.returncode}; see above")
    print(f"the whole report: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
