"""Speculation by lookup: tokens a second with and without it, of texts that copy and of texts that do not.

    python benchmarks/speculation.py --folder FOLDER  # 4 GB of disk, most of it for a while; minutes on two cores

The bundle is the small model widened to shapes like Phi-mini-MoE's (widen.py), int4, native operators: it routes and
writes as a trained model does. It is too small to rewrite a text when asked, so the copying texts are dictated: a
logits_processor makes each next token the likeliest, which costs the same as if the model had wanted it. With and
without take turns in one process. "CPU" is the processor time of all threads a token, which other programs on the
machine disturb less than they do the tokens a second. Prompts are not counted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from widen import SOURCE, Factors, widen

from phimoe_onnx import parity
from phimoe_onnx.runtime import PhiMoE
from phimoe_onnx.runtime.row import Generation

TEXT = Path(parity.__file__).with_name("persuasion.txt")


@dataclass(frozen=True)
class Task:
    """A prompt, and the options with which it is continued."""

    name: str
    prompt: list[int]
    options: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What was measured: tokens a second, processor milliseconds a token, and the generation."""

    speed: float
    cpu: float
    result: Generation


def dictate(script: Sequence[int]) -> Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]:
    """A logits_processor under which the text is `script`."""

    def process(token_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[script[len(token_ids)]] += 1000
        return logits

    return process


def tasks(model: PhiMoE, length: int, count: int) -> list[Task]:
    """The texts; prompts of `length` tokens, `count` new ones."""
    ids = model.encode(TEXT.read_text(encoding="utf-8")[:40000])
    text, other, random = ids[:length], ids[length : 2 * length], Random(0)
    again = (text * (1 + count // length))[:count]

    def changed(every: int) -> list[int]:
        return [random.choice(other) if place % every == every - 1 else token for place, token in enumerate(again)]

    mixed: list[int] = []  # 16 tokens that stand elsewhere, and then go on otherwise
    while len(mixed) < count:
        start = random.randrange(length - 16)
        mixed += [*text[start : start + 16], *random.choices(other, k=16)]
    scripts = {
        "a copy": again,
        "a copy, one token in 50 changed": changed(50),
        "a copy, one token in 20 changed": changed(20),
        "another text, dictated": other[:count],
        "beginnings of copies": mixed[:count],
    }
    chosen = [Task(name, text, {"logits_processor": dictate(script)}) for name, script in scripts.items()]
    return [*chosen, Task("free, temperature 0.8", text, {"temperature": 0.8, "seed": 1})]


def measure(model: PhiMoE, task: Task, count: int, speculate: bool) -> Turn:
    """One turn."""
    stream = model.generate(task.prompt, stream=True, max_new_tokens=count, speculate=speculate, **task.options)
    next(stream)
    begun, cpu = time.perf_counter(), time.process_time()
    *_, last = stream
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    assert last.result
    return Turn((count - 1) / seconds, 1000 * cpu / (count - 1), last.result)


def make(folder: Path, layers: int) -> Path:
    """The bundle, where `folder` has it not already."""
    from phimoe_onnx import export

    bundle, checkpoint = folder / f"wide-{layers}", folder / "checkpoint"
    if not bundle.exists():
        widen(SOURCE, checkpoint, Factors(layers=layers))
        export(checkpoint, bundle, quantize="int4", operators="native")
        shutil.rmtree(checkpoint)
    return bundle


def main() -> None:
    """Makes the bundle and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the bundle is made and kept")
    parser.add_argument("--layers", type=int, default=8, help="4 or more (default: 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=300, help="tokens of a prompt (default: 300)")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, help="as of phimoe-generate")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = PhiMoE.load(make(arguments.folder, arguments.layers), threads=arguments.threads)
    model.eos = frozenset()
    chosen = tasks(model, arguments.context, arguments.new_tokens)
    found: dict[str, tuple[list[Turn], list[Turn]]] = {task.name: ([], []) for task in chosen}
    for number in range(arguments.rounds):
        for task in chosen:
            for speculate, turns in enumerate(found[task.name]):
                turns.append(measure(model, task, arguments.new_tokens, bool(speculate)))
            without, with_it = (turns[-1].result.token_ids for turns in found[task.name])
            if without != with_it:
                sys.exit(f"{task.name}: the tokens differ")
            print(f"round {number + 1} of {arguments.rounds}: {task.name}", file=sys.stderr, flush=True)
    print("| text | without, tokens/s | with, tokens/s | times | CPU without, ms | CPU with, ms | times | accepted |")
    print("|---" * 8 + "|")
    for name, (without, with_it) in found.items():
        print(f"| {name} | {row(without, with_it)} |")


def row(without: list[Turn], with_it: list[Turn]) -> str:
    """The cells of a text's medians; "times" are medians of the rounds' own ratios."""
    cells = []
    for what, ratio in (("speed", lambda a, b: b / a), ("cpu", lambda a, b: a / b)):
        plain, drafts = ([getattr(turn, what) for turn in turns] for turns in (without, with_it))
        times = statistics.median(map(ratio, plain, drafts))
        cells += [f"{statistics.median(plain):.1f}", f"{statistics.median(drafts):.1f}", f"{times:.2f}"]
    drafted = sum(turn.result.drafted for turn in with_it)
    return " | ".join([*cells, f"{sum(turn.result.accepted for turn in with_it)} of {drafted}"])


if __name__ == "__main__":
    main()
