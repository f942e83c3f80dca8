"""A bundle larger than the memory: Phi-3.5-MoE's full shape in int4, 22 GB, by a process that may have 12 GB.

    python benchmarks/larger_than_memory.py --folder FOLDER                        # 22 GB of disk
    python benchmarks/larger_than_memory.py --folder FOLDER --layers 3 --limit 1   # a small try

Weights are random, and come from the tensors' names (drawn.py): no checkpoint lies on the disk. The bundle is made in
FOLDER if it is not there.

Then a process of its own, in a control group whose memory counts the pages of files as well, reads prompts and goes on,
once with PHIMOE_READ_AHEAD=1 and once as it is. Before each, the bundle's pages are let go, so that the first prompt
finds nothing in memory. The disk's bandwidth is measured before and after, on the same files.

With `--gguf FILE --llama-python PEERS/llama.cpp/bin/python` llama.cpp does the same with the same model in its own form
(draw_gguf.py), in its own interpreter (set_up_peers.py, limited_llama.py). It reads the whole file when it loads it, so
its first prompt finds the end of it in memory.

"Processor" is seconds of all cores together. "Read" is what the process has had read from the disk. "In memory" is the
share of the weights that a step needs which were not read: below nothing, it read more than that. "Of the disk" is read
bytes over the time of all, computing included, over the disk's bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from drawn import make
from marks import between, mark

from phimoe_onnx import PhiMoE
from phimoe_onnx.bench.traffic import step_bytes
from phimoe_onnx.bundle import read_manifest

GROUPS = Path("/sys/fs/cgroup")
BLOCK = 1 << 20  # bytes of one read
SAMPLE = 1 << 30  # bytes that the disk's bandwidth is measured on


def let_go(files: list[Path]) -> None:
    """Drops the files' pages from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bandwidth(files: list[Path]) -> float:
    """Bytes a second of reading the largest file's beginning in its order, past the page cache."""
    largest = max(files, key=lambda path: path.stat().st_size)
    count = min(SAMPLE, largest.stat().st_size) // (4 * BLOCK)
    with mmap.mmap(-1, 4 * BLOCK) as buffer, open_direct(largest) as file:
        begun = time.perf_counter()
        for number in range(count):
            os.preadv(file, [buffer], number * 4 * BLOCK)
        return count * 4 * BLOCK / (time.perf_counter() - begun)


@contextlib.contextmanager
def open_direct(path: Path) -> Iterator[int]:
    """A file descriptor whose reads go past the page cache."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Callable[[], None]]:
    """A control group with that much memory, inside this process's own where it can be; what is given makes the calling
    process one of the group.
    """
    entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = next((path for _, controllers, path in entries if "memory" in controllers.split(",")), None)
    if first is not None:
        parent, limit = GROUPS / "memory" / first.lstrip("/"), "memory.limit_in_bytes"
    else:  # version 2: a group with processes has no groups with limits inside, so it stands beside this one
        own = GROUPS / next(path for _, controllers, path in entries if not controllers).lstrip("/")
        parent, limit = GROUPS if own == GROUPS else own.parent, "memory.max"
    group = parent / f"phimoe-{os.getpid()}"
    try:
        group.mkdir()
        try:
            (group / limit).write_text(str(nbytes))
            yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
        finally:
            group.rmdir()
    except OSError as error:
        sys.exit(f"no limit can be set here: {error}; run as root, or where {parent} may be written")


def serve(bundle: str, tokens: int, steps: int, turns: int) -> None:
    """The limited process: prints a list of turns, each with what its prompt and its steps took."""
    begun = mark()
    model = PhiMoE.load(bundle)
    loaded = mark()
    model.eos = frozenset()
    found, texts = [], []
    for turn, prompt in enumerate(prompts(tokens, turns)):
        marks = [mark()]
        ids = []
        options = {"temperature": 1.0, "seed": turn, "speculate": False}
        for piece in model.generate(prompt, max_new_tokens=steps + 1, stream=True, **options):  # type: ignore[call-overload]
            ids.append(piece.token_id)
            marks.append(mark())
            print(f"turn {turn + 1}: {len(ids)} of {steps + 1} tokens", file=sys.stderr, end="\r", flush=True)
        found.append(between(marks) | {"ids": ids})
        texts.append(prompt + ids)
    print(file=sys.stderr)
    experts = model.routing(texts[0]).experts  # [layers, tokens, 2]
    of_prompt = [len(set(layer[:tokens].flat)) for layer in experts]
    of_steps = [len(set(layer[tokens:].flat)) for layer in experts]
    again = [len({*layer[t]} & {*layer[t - 1]}) / 2 for layer in experts for t in range(tokens, len(layer))]
    routing = {
        "prompt": statistics.mean(of_prompt),
        "steps": statistics.mean(of_steps),
        "again": statistics.mean(again),
    }
    print(json.dumps({"turns": found, "load": between([begun, loaded]), "routing": routing}))


def prompts(tokens: int, turns: int) -> list[list[int]]:
    """A text of so many tokens for each turn."""
    return [[3 + (7 + turn) * place * place % 2000 for place in range(tokens)] for turn in range(turns)]


def run(command: list[str], limit: int, **environment: str) -> dict[str, Any]:
    """What the limited process found."""
    with limited(limit) as enter:
        done = subprocess.run(
            command, env=os.environ | environment, preexec_fn=enter, stdout=subprocess.PIPE, check=False
        )
    if done.returncode:
        sys.exit(f"the limited process ended with {done.returncode}; see above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ours(bundle: Path, arguments: argparse.Namespace) -> list[str]:
    """The command of the limited process for a bundle."""
    here = str(Path(__file__).parent)
    values = f"{str(bundle)!r}, {arguments.tokens}, {arguments.steps}, {arguments.turns}"
    code = f"import sys; sys.path.insert(0, {here!r}); import larger_than_memory as it; it.serve({values})"
    return [sys.executable, "-c", code]


def llama(arguments: argparse.Namespace) -> list[str]:
    """The command of the limited process for a GGUF file."""
    work = {
        "model": str(arguments.gguf),
        "prompts": prompts(arguments.tokens, arguments.turns),
        "steps": arguments.steps,
        "threads": len(os.sched_getaffinity(0)),
    }
    script = Path(__file__).with_name("limited_llama.py")
    return [str(arguments.llama_python), str(script), json.dumps(work)]


def rows(name: str, found: dict[str, Any], needed: int, disk: float, tokens: int) -> Iterator[str]:
    """The table's: one for loading, and two for each turn."""
    (took,), (busy,), (read,) = (found["load"][key] for key in ("seconds", "processor", "bytes"))
    cells = (name, f"loading, {took:.1f} s", "", f"{busy:.1f} in all", f"{read / 1e6:,.0f} in all", "", "")
    yield f"| {' | '.join(cells)} |"
    for number, turn in enumerate(found["turns"], 1):
        (first, *seconds), (busy, *processor), (read, *nbytes) = (
            turn[key] for key in ("seconds", "processor", "bytes")
        )
        cells = (
            name, f"prompt {number}", f"{tokens / first:.1f}", f"{busy / tokens:.2f}", f"{read / tokens / 1e6:,.0f}",
            "", f"{read / first / disk:.0%}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"
        taken, each = statistics.median(seconds), statistics.mean(nbytes)
        cells = (
            name, f"steps {number}", f"{len(seconds) / sum(seconds):.2f} (median {1 / taken:.2f})",
            f"{statistics.mean(processor):.2f}", f"{each / 1e6:,.0f}", f"{1 - each / needed:.0%}",
            f"{sum(nbytes) / sum(seconds) / disk:.0%}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Makes the bundle and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the bundle is made and kept")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=float, default=12, help="GB (10^9 bytes) of memory (default: 12)")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt")
    parser.add_argument("--steps", type=int, default=24, help="after each prompt")
    parser.add_argument("--turns", type=int, default=2, help="prompts, each a text of its own")
    parser.add_argument("--rounds", type=int, default=1, help="times that each has its turns, one after another")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp, by draw_gguf.py")
    parser.add_argument("--llama-python", type=Path, metavar="PATH", help="the interpreter that has llama-cpp-python")
    parser.add_argument("--make", action="store_true", help="make the bundle, and no more")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("limits of memory are set by Linux's control groups")
    if (arguments.gguf is None) != (arguments.llama_python is None):
        parser.error("--gguf and --llama-python go together")
    if arguments.gguf is not None and not arguments.gguf.is_file():
        parser.error(f"{arguments.gguf}: there is no such file; draw_gguf.py writes it")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bundle = arguments.folder / f"phi-3.5-{arguments.layers}-layers"
    if not bundle.exists():
        make(bundle, arguments.layers)
    if arguments.make:
        return
    files = sorted(bundle.glob("*.data"))
    size = sum(path.stat().st_size for path in files)
    manifest = read_manifest(bundle)
    needed = step_bytes(bundle, manifest, 1, 0)
    print(f"{size / 1e9:.1f} GB of weights, {needed / 1e9:.2f} a step, under a limit of {arguments.limit:g} GB\n")
    columns = ("", "what", "tokens/s", "processor, s a token", "read, MB a token", "in memory", "of the disk")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    limit, routing = int(arguments.limit * 1e9), {}
    candidates = {
        "asked ahead": (files, lambda: run(ours(bundle, arguments), limit, PHIMOE_READ_AHEAD="1")),
        "page faults alone": (files, lambda: run(ours(bundle, arguments), limit, PHIMOE_READ_AHEAD="0")),
    }
    if arguments.gguf is not None:
        candidates["llama.cpp"] = ([arguments.gguf], lambda: run(llama(arguments), limit))
    for _ in range(arguments.rounds):
        for name, (read, measure) in candidates.items():
            let_go(read)
            before = bandwidth(read)
            found = measure()
            let_go(read)
            after = bandwidth(read)
            print(f"{name}: the disk reads {before / 1e9:.2f} GB/s before and {after / 1e9:.2f} after", file=sys.stderr)
            of_step = found.get("needed", needed)
            print(*rows(name, found, of_step, (before + after) / 2, arguments.tokens), sep="\n", flush=True)
            routing = found.get("routing", routing)
    print(
        f"\nExperts of a layer, of 16: {routing['prompt']:.1f} for the prompt, {routing['steps']:.1f} in all "
        f"{arguments.steps} steps; {routing['again']:.0%} of a step's were the step's before, too."
    )


if __name__ == "__main__":
    main()
