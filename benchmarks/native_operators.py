"""How long a pass of the native operators alone takes: layers of Phi-mini-MoE's shape, int4, over a mapped file.

    python -m benchmarks.native_operators --layers 8 --threads 2 --past 512 --tokens 1 8 512

Weights are random, and every layer has its own. For each number of tokens it prints the median and the quartiles of a
pass, and of a decode step also how much it reads in a second, weights and cached keys and values. `--no-spinning` lets
idle threads sleep. `--occupied 1` keeps a core busy with another process meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from phimoe_onnx import operators

HIDDEN, INNER, EXPERTS, HEADS, KV_HEADS, SIZE, WINDOW, VOCAB = 4096, 960, 16, 32, 8, 128, 2047, 32064
QKV = (HEADS + 2 * KV_HEADS) * SIZE
FLOAT, BYTE = TensorProto.FLOAT, TensorProto.UINT8


class Weights:
    """Initializers in one file beside the graph."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.tensors = path, path.open("wb"), []
        self.rng = np.random.default_rng(0)

    def strips(self, outputs: int, inputs: int, superblock: int) -> np.ndarray:
        """Random bytes of a matrix of 4 bits [strips, bytes], with small positive scales."""
        tiles, groups = inputs // 64, inputs // superblock
        head = -(-(groups * 32 + tiles * 16) // 64) * 64
        data = self.rng.integers(0, 256, (outputs // 16, head + tiles * 512), np.uint8)
        data[:, : groups * 32] = np.tile(np.array([0, 0x39], np.uint8), groups * 16)  # bfloat16 2 ** -13
        return data

    def add(self, name: str, array: np.ndarray, kind: int) -> str:
        """Writes an initializer at a multiple of 4096."""
        self.file.seek(-(-self.file.tell() // 4096) * 4096)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        where = {"location": self.path.name, "offset": str(self.file.tell()), "length": str(array.nbytes)}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)
        self.file.write(array.tobytes())
        self.tensors.append(tensor)
        return name


def write_model(folder: Path, layers: int) -> None:
    """x [1, S, H] -> logits of the last token, with a cache for each layer."""
    weights, nodes, inputs, outputs = Weights(folder / "model.data"), [], [], []

    def node(op: str, names: list[str], results: list[str], **attributes: float) -> None:
        domain = "" if op in ("Add", "Gather") else "phimoe.native"
        nodes.append(helper.make_node(op, names, results, domain=domain, **attributes))

    def projection(x: str, y: str, rows: int, columns: int) -> None:
        weight = weights.add(f"{y}.weight", weights.strips(rows, columns, 512), BYTE)
        node("Projection", [x, weight], [y], in_features=columns, out_features=rows, bits=4, superblock_size=512)

    x = "x"
    for layer in range(layers):
        cache, present = ([f"{prefix}{layer}.{part}" for part in ("key", "value")] for prefix in ("past", "present"))
        projection(x, f"{layer}.qkv", QKV, HIDDEN)
        sizes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "local_window_size": WINDOW}
        node("Attention", [f"{layer}.qkv", "", "", *cache, "last", "total"], [f"{layer}.a", *present], **sizes)
        projection(f"{layer}.a", f"{layer}.o", HIDDEN, HEADS * SIZE)
        node("Add", [x, f"{layer}.o"], [f"{layer}.x"])
        router = weights.add(f"{layer}.router", weights.rng.standard_normal((EXPERTS, HIDDEN), np.float32), FLOAT)
        down = weights.strips(HIDDEN, INNER, 320)
        expert = np.concatenate([weights.strips(2 * INNER, HIDDEN, 512).ravel(), down.ravel()])
        experts = weights.add(f"{layer}.experts", np.tile(expert, (EXPERTS, 1)), BYTE)
        shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts": EXPERTS}
        shape |= {"gate_up_bits": 4, "down_bits": 4, "gate_up_superblock_size": 512, "down_superblock_size": 320}
        node("SparseMixerMoE", [f"{layer}.x", router, experts], [f"{layer}.m"], **shape, router_jitter_noise=0.01)
        node("Add", [f"{layer}.x", f"{layer}.m"], [f"{layer}.y"])
        x = f"{layer}.y"
        inputs += [helper.make_tensor_value_info(name, FLOAT, [1, KV_HEADS, None, SIZE]) for name in cache]
        outputs += [helper.make_tensor_value_info(name, FLOAT, [1, KV_HEADS, None, SIZE]) for name in present]
    index = weights.add("index", np.array([-1]), TensorProto.INT64)
    node("Gather", [x, index], ["last_token"], axis=1)
    projection("last_token", "logits", VOCAB, HIDDEN)
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, [1]) for name in ("last", "total")]
    inputs.append(helper.make_tensor_value_info("x", FLOAT, [1, None, HIDDEN]))
    outputs.append(helper.make_tensor_value_info("logits", FLOAT, [1, 1, VOCAB]))
    weights.file.close()
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights.tensors)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("phimoe.native", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), folder / "model.onnx")


def passes(session: ort.InferenceSession, past: int, tokens: int, seconds: float) -> Iterator[float]:
    """Seconds of one pass after another, each with other numbers and so other experts."""
    rng = np.random.default_rng(tokens)
    shape, binding = (1, KV_HEADS, past + tokens, SIZE), session.io_binding()
    buffers = []
    for info in session.get_inputs():
        if info.name.startswith("past"):
            buffers.append(buffer := rng.standard_normal(shape, np.float32))
            for bind, name in ((binding.bind_input, info.name), (binding.bind_output, f"present{info.name[4:]}")):
                bind(name, "cpu", 0, np.float32, shape, buffer.ctypes.data)
    binding.bind_cpu_input("last", np.array([past + tokens - 1], np.int32))
    binding.bind_cpu_input("total", np.array([past + tokens], np.int32))
    binding.bind_output("logits")
    until = time.perf_counter() + seconds
    for count in range(10**6):
        binding.bind_cpu_input("x", rng.standard_normal((1, tokens, HIDDEN), np.float32))
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        end = time.perf_counter()
        if count:  # the first pass touches the file for the first time
            yield end - start
        if end > until and count >= 3:
            return


def spin() -> None:
    """Keeps a core busy."""
    while True:
        pass


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--seconds", type=float, default=5, help="for each number of tokens")
    parser.add_argument("--spinning", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--occupied", type=int, default=0, help="processes that keep a core busy")
    arguments = parser.parse_args()
    busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(arguments.occupied)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, arguments.layers)
        options = ort.SessionOptions()
        options.intra_op_num_threads = arguments.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(arguments.spinning)))
        options.register_custom_ops_library(str(operators.library()))
        start = time.perf_counter()
        session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        print(f"kernels {operators.kernels()}, loaded in {time.perf_counter() - start:.3f} s")
        expert = 3 * HIDDEN * INNER
        layer = (QKV + HEADS * SIZE) * HIDDEN + 2 * expert
        read = (arguments.layers * layer + VOCAB * HIDDEN) * 4.19 / 8 + arguments.layers * EXPERTS * HIDDEN * 4
        read += arguments.layers * 2 * KV_HEADS * SIZE * 4 * min(arguments.past + 1, WINDOW)
        for process in busy:
            process.start()
        for tokens in arguments.tokens:
            taken = list(passes(session, arguments.past, tokens, arguments.seconds))
            low, median, high = statistics.quantiles(taken, n=4)
            rate = f", {read / median / 1e9:.1f} GB/s" if tokens == 1 else ""
            milliseconds = f"{median * 1e3:.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f})"
            print(f"{tokens} tokens: {milliseconds}, {tokens / median:.1f} tokens/s{rate}", flush=True)
        for process in busy:
            process.terminate()


if __name__ == "__main__":
    main()
