"""What a few very large activations do to rounded bundles: the small model, some channels of its norms made larger.

    python benchmarks/outliers.py persuasion.txt --folder FOLDER --tokens 16384

Large models have such channels. In FOLDER the small model is written with every 48th channel of each LayerNorm before
attention and experts multiplied by FACTOR, and what reads the channel divided by it. Powers of two make that exact: all
these checkpoints compute the same function. They are exported with ONNX Runtime's operators, which round 32 activations
by a common scale, and with the native ones, which round 192 (a row of this model; 256 or more of a large one). Both
hold the same integers as weights. The exporter moves such gains into them (phimoe_onnx/exporter/gains.py); with OUTLIER
there out of reach the table, perplexity.py's, shows what it spares.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from phimoe_onnx import export

SOURCE = Path(__file__).parent.parent / "models/phimoe-austen"
EVERY = 48
NORM = re.compile(r"layers\.\d+\.(input|post_attention)_layernorm\.")
READER = re.compile(r"layers\.\d+\.(self_attn\.[qkv]_proj|block_sparse_moe\.(gate|experts\.\d+\.w[13]))\.weight")


def magnify(folder: Path, factor: int) -> Path:
    """The same function with channels `factor` times as large, as a checkpoint in `folder`."""
    shutil.copytree(SOURCE, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if NORM.search(name):
                tensor[::EVERY] *= factor
            elif READER.search(name):
                tensor[:, ::EVERY] /= factor
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def main() -> None:
    """Makes the bundles that are not there and scores them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="as of perplexity.py")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints and bundles are made and kept")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 8, 64], help="powers of two (default: 1 8 64)")
    parser.add_argument("--tokens", default="16384", help="of the text (default: %(default)s)")
    arguments = parser.parse_args()
    bundles = []
    for factor in arguments.factors:
        checkpoint = arguments.folder / f"checkpoint-{factor}"
        if not checkpoint.exists():
            magnify(checkpoint, factor)
        for quantize, operators in (("none", "stock"), ("int4", "stock"), ("int4", "native"), ("int8", "native")):
            bundle = arguments.folder / f"{quantize}-{operators}-{factor}"
            if not bundle.exists():
                export(checkpoint, bundle, quantize=quantize, operators=operators)
            bundles.append(str(bundle))
    command = [sys.executable, str(Path(__file__).with_name("perplexity.py")), str(arguments.text), *bundles]
    sys.exit(subprocess.run([*command, "--tokens", arguments.tokens]).returncode)


if __name__ == "__main__":
    main()
