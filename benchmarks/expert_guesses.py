"""How often a token's experts are guessed before its router runs, on a bundle of native operators and a text.

    phimoe-export models/phimoe-austen -o build/austen --quantize int4 --operators native
    python benchmarks/expert_guesses.py build/austen phimoe_onnx/exporter/passage.txt

Printed are, for each layer, the shares of the two chosen experts that are among the guessed ones. "Token before": what
the same layer chose for the token before. "Next router": the layer's own router, given what the layer before it gave to
its experts, and so known a layer earlier; two experts are guessed. "By chance" is what any two of all would give.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from phimoe_onnx import PhiMoE, operators
from phimoe_onnx.bundle import ATTENTION_MASK, INPUT_IDS, CacheShape
from phimoe_onnx.runtime.probe import sparse_mixer

Numbers = NDArray[Any]


def inside(bundle: Path, ids: list[int], cache: CacheShape) -> tuple[list[Numbers], list[Numbers], float]:
    """What goes into each layer's experts [T, H], each layer's router [E, H], and the jitter."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    layers = [node for node in model.graph.node if node.op_type == "SparseMixerMoE"]
    routers = []
    for name in (node.input[1] for node in layers):
        tensor = next(each for each in model.graph.initializer if each.name == name)
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(bundle))
        routers.append(numpy_helper.to_array(tensor))
    for node in layers:
        model.graph.output.append(helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(operators.library()))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {info.name: _feed(info, ids, cache) for info in session.get_inputs()}
    values = session.run([node.input[0] for node in layers], feeds)
    jitter = next(each.f for each in layers[0].attribute if each.name == "router_jitter_noise")
    return [value.reshape(len(ids), -1) for value in values], routers, jitter


def _feed(info: Any, ids: list[int], cache: CacheShape) -> Numbers:
    if info.name.startswith("past_key_values"):
        return np.zeros((1, cache.num_key_value_heads, 0, cache.head_dim), np.float32)
    if info.name == INPUT_IDS:
        return np.array([ids])
    return np.ones((1, len(ids)), np.int64) if info.name == ATTENTION_MASK else np.array([len(ids)])


def share(chosen: Numbers, guessed: Numbers) -> float:
    """Of the chosen experts [T, 2] those that are among the guessed ones [T, n]."""
    return float((chosen[:, :, None] == guessed[:, None, :]).any(2).mean())


def main() -> None:
    """Prints a Markdown table, a row for each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    model = PhiMoE.load(arguments.bundle)
    ids = model.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: model.decoding.context]
    given, routers, jitter = inside(arguments.bundle, ids, model.decoding.cache)
    print(f"{len(ids)} tokens\n\n| layer | token before | next router | by chance |\n|---|---|---|---|")
    sums = np.zeros(2)
    for layer, (x, router) in enumerate(zip(given, routers, strict=True)):
        chosen = sparse_mixer(x @ router.T, jitter)[0]
        before = share(chosen[1:], chosen[:-1])
        ahead = share(chosen, sparse_mixer(given[layer - 1] @ router.T, jitter)[0]) if layer else float("nan")
        sums += (before / len(routers), np.nan_to_num(ahead) / (len(routers) - 1))
        print(f"| {layer} | {before:.0%} | {ahead:.0%} | {2 / len(router):.0%} |")
    print(f"| mean | {sums[0]:.0%} | {sums[1]:.0%} | |")


if __name__ == "__main__":
    main()
