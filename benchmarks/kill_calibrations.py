"""Kills a calibration in its second layer, lets it go on, and compares the bundle with an undisturbed one.

    python -m benchmarks.kill_calibrations [--shape Phi-mini-MoE] [--tokens 2048] [--divide N] [--folder FOLDER]

The checkpoint has two whole layers of the shape, with all experts and random weights, and the small model's
vocabulary. The clock of each run is printed. --divide N takes an Nth of all widths.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shapes import SHAPES, write_config
from phimoe_onnx.files import sha256

VOCABULARY = {"vocab_size": 2048, "eos_token_id": 2043}  # that of the tokenizer which the checkpoint gets
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def main() -> None:
    """Writes the checkpoint and runs three exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Phi-mini-MoE", help="default: Phi-mini-MoE")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text (default: 2048)")
    parser.add_argument("--divide", type=int, default=1, metavar="N", help="all widths, by 1, 2 or 4 (default: 1)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where all is written (default: a temporary one)")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    config = shape | {name: shape[name] // arguments.divide for name in WIDTHS} | VOCABULARY | {"num_hidden_layers": 2}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        count = write_config(folder / "checkpoint", config, random_layers=2)
        print(f"{arguments.shape}, two layers of {count / 1e9:.2f} B parameters, {arguments.tokens} tokens", flush=True)
        middle = folder / ".killed.calibration" / f"1.{config['num_local_experts'] // 2}"
        run = export(folder, "killed", arguments.tokens)
        while run.process.poll() is None and not middle.exists():
            time.sleep(0.1)
        run.process.send_signal(signal.SIGKILL)
        run.end("killed in the middle of the second layer's experts", -signal.SIGKILL)
        export(folder, "killed", arguments.tokens).end("went on", 0)
        export(folder, "whole", arguments.tokens).end("undisturbed", 0)
        killed, whole = (hashes(folder / each) for each in ("killed", "whole"))
        if killed != whole:
            sys.exit(f"other bytes in {', '.join(name for name in whole if killed.get(name) != whole[name])}")
        print(f"the same bytes in all {len(whole)} files")


def hashes(bundle: Path) -> dict[str, str]:
    """Of all files, by name."""
    return {file.name: sha256(file) for file in sorted(bundle.iterdir())}


class Export:
    """An export that runs."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.begun = time.monotonic()

    def end(self, what: str, code: int) -> None:
        """Waits for it, and says how long it took."""
        if self.process.wait() != code:
            sys.exit(f"{what}: ended with {self.process.returncode}, expected {code}")
        print(f"{what}: {time.monotonic() - self.begun:.0f} s", flush=True)


def export(folder: Path, name: str, tokens: int) -> Export:
    """Begins a calibrated export of `folder`/checkpoint, int4 with native operators."""
    options = ["--quantize", "int4", "--operators", "native", "--calibrate", "--calibration-tokens", str(tokens)]
    where = [str(folder / "checkpoint"), "-o", str(folder / name)]
    return Export([sys.executable, "-m", "phimoe_onnx.cli.export", *where, *options])


if __name__ == "__main__":
    main()
