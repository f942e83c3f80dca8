"""Kills an export at random moments, many times: there must never be a bundle that is not whole, and the end must be the same.

python benchmarks/kill_exports.py models/phimoe-austen --kills 200

Each round starts phimoe-export's work in a process of its own and kills it with SIGKILL after a random part of the time that an
undisturbed export takes; every fifth round starts over, the others go on with what the one before left.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

from phimoe_onnx import bundle
from phimoe_onnx.exporter.pipeline import export


def main() -> None:
    """Runs the rounds and prints what was found; a broken bundle or different bytes end it with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    context = multiprocessing.get_context("forkserver")  # torch is loaded once, in the server
    context.set_forkserver_preload(["phimoe_onnx.exporter.pipeline"])
    folder = Path(tempfile.mkdtemp())

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=export, args=(arguments.source, output), kwargs={"quantize": arguments.quantize})
        process.start()
        return process

    start(folder / "warm").join()  # the first one pays for loading torch
    undisturbed = folder / "undisturbed"
    begin = time.monotonic()
    start(undisturbed).join()
    seconds = time.monotonic() - begin
    output = folder / "bundle"
    killed = finished = 0
    rounds = track(range(arguments.kills), console=Console(stderr=True), transient=True)
    for number in rounds:
        process = start(output)
        process.join(random.uniform(0, seconds))
        if process.is_alive():
            killed += 1
        process.kill()
        process.join()
        if output.exists():
            finished += 1
            bundle.check_files(output, bundle.read_manifest(output), hash_everything=True)
            shutil.rmtree(output)
        elif number % 5 == 4:
            shutil.rmtree(folder / ".bundle.partial", ignore_errors=True)
    process = start(output)
    process.join()
    for path in sorted(undisturbed.iterdir()):
        if (output / path.name).read_bytes() != path.read_bytes():
            raise SystemExit(f"{path.name} is not that of the undisturbed export")
    left = sorted(path.name for path in folder.iterdir() if path.name not in ("warm", "undisturbed", "bundle"))
    if left:
        raise SystemExit(f"left behind: {', '.join(left)}")
    print(f"{killed} exports killed, {finished} were complete; every bundle whole, the last one byte-identical, nothing left behind")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
