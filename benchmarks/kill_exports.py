"""Kills exports at random moments, many times: there must never be a bundle that is not whole, and the end must be the
same.

From the repository's root, with the small model and a random one of 95 M parameters, whose weights take longer to
write:

    python -m benchmarks.kill_exports [--kills 200]

Each round exports to the same output, with --overwrite, as int4 or as int8, and ends with SIGKILL somewhere in a phase
drawn at random; it goes on with whatever the rounds before left. After it, what stands under the output's name is
compared with exports that nobody disturbed, byte by byte. Every fifth round is not killed, and must end with nothing
left beside the bundle. A process is a fork of this one, which has imported and traced everything: what is killed is the
work on the disk.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import onnx_ir as ir
import torch
from rich.console import Console
from rich.progress import track

from phimoe_onnx import bundle
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter import pipeline, staging
from phimoe_onnx.exporter.trace import trace
from tests.checkpoints import MODEL, write_checkpoint

PHASES = ("graphs", "writing weights", "hashing", "renaming")
FORMS = ("int4", "int8")


def main() -> None:
    """Runs the rounds and prints what was found; a broken bundle, different bytes or something left behind end it with
    an error.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="of each checkpoint (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(1)  # a fork has no other thread than the one that calls it
    folder = Path(tempfile.mkdtemp())
    shape = {"hidden_size": 1024, "intermediate_size": 960, "num_attention_heads": 16, "num_key_value_heads": 4}
    for checkpoint in (MODEL, write_checkpoint(folder / "random-95M", dtype=torch.bfloat16, shards=2, **shape)):
        Killer(checkpoint, folder).run(arguments.kills)
    shutil.rmtree(folder)


@dataclass
class Ended:
    """How a process ended: the phase that it was in, None if nobody killed it, and when each phase began."""

    phase: str | None
    begins: list[float]


class Killer:
    """The exports of one checkpoint, and what they must become."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder / "rounds"
        self.output = self.folder / "bundle"
        config = read_config(checkpoint)
        self.traced = trace(config, parameters(config, read_headers(checkpoint)), ir.DataType.FLOAT)
        self.expected: dict[str, dict[str, bytes]] = {}
        for form in FORMS:
            reference = folder / f"{checkpoint.name}-{form}"
            self.begins = self.export(reference, form).begins
            self.expected[form] = _contents(reference)
            if self.export(self.output, form) and _contents(self.output) != self.expected[form]:
                raise SystemExit(f"two {form} exports of {checkpoint.name} differ")
            shutil.rmtree(self.folder)
            shutil.rmtree(reference)

    def run(self, kills: int) -> None:
        """Kills so many exports and prints where."""
        landed: Counter[str] = Counter()
        standing: Counter[str] = Counter()
        completed = 0
        rounds = track(range(10 * kills), console=Console(stderr=True), transient=True)
        for number in rounds:
            before = self.standing()
            # half of the time another than the round before, whose weights then count for nothing
            form = random.choice(FORMS)
            if number % 5 == 4:
                self.export(self.output, form)
                if self.standing() != form or [path.name for path in self.folder.iterdir()] != ["bundle"]:
                    raise SystemExit(
                        f"the run after the kills left {sorted(path.name for path in self.folder.iterdir())}"
                    )
                completed += 1
                if sum(landed.values()) >= kills:
                    break
                if random.random() < 0.5:  # the next rounds have no bundle to replace
                    shutil.rmtree(self.folder)
                continue
            phase = random.randrange(len(PHASES))
            end = self.export(self.output, form, phase, random.uniform(0, self.begins[phase + 1] - self.begins[phase]))
            after = self.standing()
            if end.phase:
                landed[end.phase] += 1
                standing[
                    "a whole bundle" if after else "the old one, moved aside" if before else "none, as before"
                ] += 1
            if before and not after and end.phase != "renaming":
                raise SystemExit(f"a kill while {end.phase} took the old bundle away")
        print(
            f"{self.checkpoint.name}: {sum(landed.values())} exports killed (" + _list(landed, PHASES) + ");", end=" "
        )
        print(
            f"then stood there {_list(standing, sorted(standing))}, every bundle byte-identical to an undisturbed "
            f"export;",
            end=" ",
        )
        print(f"{completed} runs after kills ended in such a bundle and left nothing beside it")

    def export(self, output: Path, form: str, phase: int | None = None, delay: float = 0.0) -> Ended:
        """Exports in a process of its own, which is killed so many seconds after the beginning of a phase."""
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os._exit(self._child(output, form, write))
        os.close(write)
        begins = [time.monotonic()]
        killed = False
        while not killed:
            running = phase is not None and len(begins) == phase + 1
            wait = begins[-1] + delay - time.monotonic() if running else None
            if not select.select([read], [], [], None if wait is None else max(0.0, wait))[0]:
                os.kill(child, signal.SIGKILL)
                killed = True
            elif os.read(read, 1):
                begins.append(time.monotonic())
            else:
                break
        status = os.waitpid(child, 0)[1]
        while os.read(read, 1):  # phases that began before the signal came
            begins.append(time.monotonic())
        os.close(read)
        if not killed and status != 0:
            raise SystemExit("an export failed")
        ended = not killed or status == 0
        return Ended(None if ended else PHASES[len(begins) - 1], [*begins, time.monotonic()])

    def standing(self) -> str:
        """Which form's bundle stands under the output's name; "" for none."""
        if not self.output.exists():
            return ""
        contents = _contents(self.output)
        for form, expected in self.expected.items():
            if contents == expected:
                return form
        raise SystemExit(f"{self.output} is neither whole bundle")

    def _child(self, output: Path, form: str, pipe: int) -> int:
        phases = iter(PHASES[1:])
        expected = next(phases)

        def reach(phase: str) -> None:
            nonlocal expected
            if phase == expected:
                os.write(pipe, b".")
                expected = next(phases, "")

        flush = staging._flush
        try:
            with (
                patch.object(pipeline, "trace", lambda *_: self.traced.clone()),
                patch.object(staging, "_flush", lambda folder: (reach("renaming"), flush(folder))),
            ):
                pipeline.export(
                    self.checkpoint,
                    output,
                    quantize=form,
                    operators="stock",
                    overwrite=True,
                    progress=lambda phase, *_: reach(phase),
                )
            return 0
        except BaseException:
            traceback.print_exc()
            return 1


def _contents(folder: Path) -> dict[str, bytes]:
    """The SHA-256 of every file, the manifest's and hidden ones included."""
    return {path.name: bundle.sha256(path).encode() for path in folder.iterdir()}


def _list(counts: Counter[str], names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in names)


if __name__ == "__main__":
    main()
