"""Makes a large checkpoint of the small model: the same function, in shapes like Phi-mini-MoE's.

    python benchmarks/widen.py FOLDER            # eight layers, 4032 channels, 30 / 10 heads of 128, experts 960 wide
    python benchmarks/widen.py FOLDER --noise 0.02

Random weights choose experts at random and write nonsense. A widened model routes like the trained one and writes its
text, at the speed of its new shape. How, after Net2Net (arXiv 1511.05641):

- Channels stand there several times. Each copy is computed alike, and what reads them weighs the copies with shares
  that sum to 1. Shares are powers of two, so that bf16 holds every new weight exactly.
- A LayerNorm sees each channel equally often, so mean and variance stay. That takes a multiple of 192 channels, the
  small model's; 4032 is the nearest to Phi-mini's 4096.
- A head's channels are repeated by 4, and queries halved: scores are divided by the root of the head's size. The rope
  factors give each new pair of channels its old frequency.
- Of a larger number of layers, the new ones have an output of zero. They compute and route as the layer before them.
- The vocabulary is padded with tokens of no weight and a bias of -8192, which nobody chooses.

Noise moves every weight by a part of itself, so that copies are no longer equal. The text then is another one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SOURCE = Path(__file__).parent.parent / "models/phimoe-austen"
NEVER = -8192.0  # the bias of a padded token


@dataclass(frozen=True)
class Factors:
    """How many times larger what is; `layers` and `vocab` are numbers of the result."""

    hidden: int = 21
    heads: int = 5
    head_dim: int = 4
    experts: int = 10
    layers: int = 8
    vocab: int = 32064

    def check(self, config: dict[str, Any]) -> None:
        """Raises ValueError for what has no widened form."""
        if min(self.hidden, self.heads, self.experts) < 1:
            raise ValueError("--hidden, --heads and --experts are 1 or more")
        if self.head_dim not in (1, 4, 16):
            raise ValueError(f"--head-dim is {self.head_dim}, expected 1, 4 or 16, whose roots bf16 multiplies exactly")
        for name, value in {"num_hidden_layers": self.layers, "vocab_size": self.vocab}.items():
            if value < config[name]:
                raise ValueError(f"{name} is {value}, expected {config[name]} or more, what the source has")


def shares(count: int) -> list[float]:
    """Powers of two that sum to 1, as near to each other as they can be."""
    power = 2 ** int(math.log2(count))
    larger = 2 * power - count
    return [1 / power] * larger + [1 / (2 * power)] * (count - larger)


def copied(tensor: Tensor, dim: int, tiles: int, repeats: int = 1) -> Tensor:
    """Each channel of `dim` several times: the whole in `tiles`, each channel of it `repeats` times side by side."""
    return torch.cat([tensor] * tiles, dim).repeat_interleave(repeats, dim)


def shared(tensor: Tensor, dim: int, tiles: int, repeats: int = 1) -> Tensor:
    """The weights of copied channels: those of a channel's copies sum to its own."""
    tiled = torch.cat([tensor * share for share in shares(tiles)], dim)
    return tiled.repeat_interleave(repeats, dim) / repeats


def widened(name: str, tensor: Tensor, factors: Factors) -> Tensor:
    """A parameter of one layer, of the embedding or of the head, in the new shape, by its name in the checkpoint."""
    heads = (factors.heads, factors.head_dim)
    kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if kind in ("q_proj", "k_proj", "v_proj"):
        tensor = copied(tensor, 0, *heads) / (math.sqrt(factors.head_dim) if kind == "q_proj" else 1)
    elif kind in ("w1", "w3"):
        tensor = copied(tensor, 0, factors.experts)
    elif kind == "embed_tokens":
        return copied(tensor, 1, factors.hidden)
    elif kind in ("o_proj", "w2", "norm", "input_layernorm", "post_attention_layernorm"):
        tensor = copied(tensor, 0, factors.hidden)
    if tensor.ndim == 1:
        return tensor
    read = {"o_proj": heads, "w2": (factors.experts,)}.get(kind, (factors.hidden,))
    return shared(tensor, 1, *read)


def padded(name: str, tensor: Tensor, vocab: int) -> Tensor:
    """The embedding and the head with rows for `vocab` tokens."""
    rows = tensor.new_zeros(vocab - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, rows + NEVER if name == "lm_head.bias" else rows])


def config_of(config: dict[str, Any], factors: Factors) -> dict[str, Any]:
    """The result's config.json."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope = dict(config["rope_scaling"])
    for part in ("short_factor", "long_factor"):
        # a factor times theta^(2 i / D) is what divides the position: the power grows by 1 / repeats of a step
        rope[part] = [
            factor * config["rope_theta"] ** (-2 * copy / (head_dim * factors.head_dim))
            for factor in rope[part]
            for copy in range(factors.head_dim)
        ]
    return config | {
        "hidden_size": config["hidden_size"] * factors.hidden,
        "intermediate_size": config["intermediate_size"] * factors.experts,
        "num_attention_heads": config["num_attention_heads"] * factors.heads,
        "num_key_value_heads": config["num_key_value_heads"] * factors.heads,
        "num_hidden_layers": factors.layers,
        "head_dim": head_dim * factors.head_dim,
        "vocab_size": factors.vocab,
        "rope_scaling": rope,
    }


def layers_of(layers: int, result: int) -> list[tuple[int, bool]]:
    """For each layer of the result, which layer it is like, and whether it adds anything: one of each's does."""
    likes = [number * layers // result for number in range(result)]
    return [(like, like not in likes[:number]) for number, like in enumerate(likes)]


class Source:
    """The tensors of a checkpoint's files."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        self._files = {name: folder / file for name, file in index["weight_map"].items()}

    def names(self, beginning: str = "") -> list[str]:
        """Those that begin so."""
        return sorted(name for name in self._files if name.startswith(beginning))

    def read(self, name: str) -> Tensor:
        """A tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


Maker = Callable[[], Tensor]


def shards(source: Source, config: dict[str, Any], factors: Factors, noise: float) -> Iterator[dict[str, Maker]]:
    """The result's shards: for each tensor what makes it."""
    random = torch.Generator().manual_seed(0)

    def make(name: str, adds: bool = True) -> Tensor:
        kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        tensor = widened(name, source.read(name), factors)
        if not adds and kind in ("o_proj", "w2"):
            tensor = torch.zeros_like(tensor)
        if noise and tensor.ndim == 2:
            tensor = tensor * (1 + noise * torch.randn(tensor.shape, generator=random)).to(tensor.dtype)
        return padded(name, tensor, factors.vocab) if kind in ("embed_tokens", "lm_head") else tensor

    for number, (like, adds) in enumerate(layers_of(config["num_hidden_layers"], factors.layers)):
        prefix = f"model.layers.{like}."
        yield {
            f"model.layers.{number}.{name.removeprefix(prefix)}": lambda name=name, adds=adds: make(name, adds)  # type: ignore[misc]
            for name in source.names(prefix)
        }
    rest = [name for name in source.names() if not name.startswith("model.layers.")]
    yield {name: lambda name=name: make(name) for name in rest}  # type: ignore[misc]


def write_shard(path: Path, makers: dict[str, Maker]) -> None:
    """Writes a safetensors file, one tensor in memory at a time; the header, whose length is known first, last."""
    names = {name: {"dtype": "BF16", "shape": [2**40] * 2, "data_offsets": [2**50] * 2} for name in makers}
    room = -(-len(json.dumps(names)) // 8) * 8  # for the longest numbers that may come
    header, end = {}, 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, maker in makers.items():
            tensor = maker().to(torch.bfloat16).contiguous()
            file.write(tensor.view(torch.uint8).numpy().data)
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        file.seek(0)
        file.write(struct.pack("<Q", room) + json.dumps(header).encode().ljust(room))


def widen(
    source: Path, output: Path, factors: Factors, noise: float = 0.0, report: Callable[..., object] = print
) -> None:
    """Writes the widened checkpoint to `output`, a new folder, a shard a layer.

    Raises:
        ValueError: the factors have no widened form.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    factors.check(config)
    output.mkdir(parents=True)
    for file in source.glob("*token*.json"):
        shutil.copyfile(file, output / file.name)
    (output / "config.json").write_text(json.dumps(config_of(config, factors), indent=1), encoding="utf-8")
    count, weight_map = factors.layers + 1, {}
    for number, makers in enumerate(shards(Source(source), config, factors, noise), 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_shard(output / name, makers)
        weight_map.update(dict.fromkeys(makers, name))
        report(f"shard {number} of {count}")
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--source", type=Path, default=SOURCE, help="the small model's checkpoint")
    for name, value in vars(Factors()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--noise", type=float, default=0.0, help="the part of itself by which a weight moves")
    arguments = parser.parse_args()
    factors = Factors(**{name: getattr(arguments, name) for name in vars(Factors())})
    try:
        widen(arguments.source, arguments.output, factors, arguments.noise)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
