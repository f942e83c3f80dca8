"""Prints what each width of each kind of matrix in each layer costs, and how well fewer spans than layers find that.

python benchmarks/measure_widths.py models/phimoe-austen
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.places import Place, places
from phimoe_onnx.exporter.quantize.measure import measure
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.exporter.widths import PASSAGE, Widths, cut
from phimoe_onnx.layered import checkpoint_weights

Costs = dict[Place, dict[int, float]]


def main() -> None:
    """Measures with a span for each layer, then with fewer, and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, default=PASSAGE, help="UTF-8 (default: the package's)")
    parser.add_argument("--operators", choices=("native", "stock"), default="native")
    arguments = parser.parse_args()
    config = read_config(arguments.checkpoint)
    widths = Widths(config, TARGETS["cpu"], {"operators": arguments.operators})
    read = checkpoint_weights(config, parameters(config, read_headers(arguments.checkpoint)))
    windows = cut(arguments.text.read_text(encoding="utf-8"), arguments.checkpoint, config)
    spans = config.num_hidden_layers
    alone = measure(config, read, widths.recipes, windows, spans=spans)
    head = " | ".join(f"{bits} bits" for bits in widths.recipes)
    print(f"| place, nats a token | {head} |\n|---{'|---' * len(widths.recipes)}|")
    for place in places(config):
        print(f"| {place.kind} {place.layer} | " + " | ".join(f"{cost:g}" for cost in alone[place].values()) + " |")
    while spans > 1:
        spans //= 2
        _compare(spans, alone, measure(config, read, widths.recipes, windows, spans=spans))


def _compare(spans: int, alone: Costs, shared: Costs) -> None:
    """Prints how far costs are off, as factors."""
    print(f"\n{spans} span{'s' if spans > 1 else ''}:")
    for bits in next(iter(alone.values())):
        logs = [abs(math.log(shared[place][bits] / alone[place][bits])) for place in alone if alone[place][bits]]
        sums = [sum(costs[place][bits] for place in costs) for costs in (alone, shared)]
        mean, worst = math.exp(sum(logs) / len(logs)), math.exp(max(logs))
        print(f"{bits} bits: off by {mean:.2f} on average, {worst:.2f} at worst; all together {sums[1] / sums[0]:.2f}")


if __name__ == "__main__":
    main()
