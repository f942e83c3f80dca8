"""The operators of native/operators in ONNX Runtime, against native/FORMAT.md in numpy (native_format.py)."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from phimoe_onnx import operators
from phimoe_onnx.runtime.ort.mapped import released
from tests.native_format import Matrix, expert_bytes, mixture, random_matrix

ort = pytest.importorskip("onnxruntime")
LIBRARY = operators.library()
if LIBRARY is None:
    pytest.skip("the native operators are not built here", allow_module_level=True)

TYPES = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def model(
    op_type: str,
    constants: dict[str, Any],
    fed: dict[str, str],
    inputs: list[str],
    outputs: list[str] = ["y"],  # noqa: B006
    **attributes: Any,
) -> onnx.ModelProto:
    """One node; `fed` are the graph's inputs and their types, of any shape."""
    node = helper.make_node(op_type, inputs, outputs, name="the/node", domain="phimoe.native", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TYPES[dtype], None) for name, dtype in fed.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("phimoe.native", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def session(proto: onnx.ModelProto | Path, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    source = str(proto) if isinstance(proto, Path) else proto.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def projection(matrix: Matrix, bias: Any = None, weight: Any = None, **changed: int) -> onnx.ModelProto:
    outputs, inputs = matrix.codes.shape
    attributes = {
        "in_features": inputs,
        "out_features": outputs,
        "bits": matrix.bits,
        "superblock_size": matrix.superblock_size,
    } | changed
    constants = {"weight": matrix.strips() if weight is None else weight}
    if bias is not None:
        constants["bias"] = bias
    return model("Projection", constants, {"x": "float32"}, ["x", *constants], **attributes)


def rows(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "superblock"), [(64, 128, 128), (37, 200, 64), (16, 960, 320), (1, 1, 64)]
)
def test_a_projection_is_the_formats_to_the_last_bit(bits: int, outputs: int, inputs: int, superblock: int) -> None:
    rng = np.random.default_rng(bits * outputs)
    matrix = random_matrix(rng, bits, outputs, inputs, superblock)
    bias = rows(rng, outputs)
    x = rows(rng, 3, 5, inputs) * np.float32(10) ** rng.integers(-3, 4, (3, 5, 1)).astype(np.float32)
    expected = matrix.multiply(x.reshape(15, -1)).reshape(3, 5, -1)
    for threads in (1, 2):
        np.testing.assert_array_equal(session(projection(matrix), threads).run(None, {"x": x})[0], expected)
        np.testing.assert_array_equal(
            session(projection(matrix, bias), threads).run(None, {"x": x})[0], expected + bias
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_projection_is_near_the_product_of_the_weights(bits: int) -> None:
    rng = np.random.default_rng(bits)
    matrix = random_matrix(rng, bits, 80, 512, 256)
    x = rows(rng, 40, 512)
    [y] = session(projection(matrix)).run(None, {"x": x})
    exact = x @ matrix.values().T
    assert np.abs(y - exact).max() < 0.03 * np.abs(exact).max()


def test_a_row_alone_is_the_same_row_among_many() -> None:
    rng = np.random.default_rng(1)
    matrix = random_matrix(rng, 4, 112, 384, 384)
    x = rows(rng, 67, 384)
    running = session(projection(matrix), 2)
    [together] = running.run(None, {"x": x})
    for count in (1, 2, 7, 16):
        [few] = running.run(None, {"x": x[:count]})
        np.testing.assert_array_equal(few, together[:count])
    for r in range(67):
        np.testing.assert_array_equal(running.run(None, {"x": x[r]})[0], together[r])  # of rank 1


def test_no_rows_give_no_rows() -> None:
    matrix = random_matrix(np.random.default_rng(2), 4, 48, 64, 64)
    [y] = session(projection(matrix)).run(None, {"x": np.zeros((2, 0, 64), np.float32)})
    assert y.shape == (2, 0, 48)


def test_what_is_not_finite_gives_nan_in_its_row_alone() -> None:
    rng = np.random.default_rng(3)
    matrix = random_matrix(rng, 4, 32, 128, 64)
    x = rows(rng, 3, 128)
    x[1, 70] = np.inf
    [y] = session(projection(matrix)).run(None, {"x": x})
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], matrix.multiply(x[[0, 2]]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": np.zeros((3, 64), np.uint8)}, r"weight is \[3, 64\], expected \[3, 576\]"),
        ({"weight": np.zeros(1920, np.uint8)}, r"weight is \[1920\], expected \[3, 576\]"),
        ({"out_features": 64}, r"weight is \[3, 576\], expected \[4, 576\]"),
        ({"bias": np.zeros(47, np.float32)}, r"bias is \[47\], expected \[48\]"),
        ({"bits": 5}, "codes of 5 bits"),
        ({"bits": -4}, "bits is -4, expected 1 to"),
        ({"superblock_size": 48}, "superblocks of 48"),
        ({"superblock_size": 0}, "superblock_size is 0, expected 1 to"),
        ({"in_features": 1 << 50}, "in_features is 1125899906842624, expected"),
        ({"out_features": 1 << 28}, r"weight is \[3, 576\], expected \[16777216, 576\]"),
        ({"weight": np.zeros((3, 576), np.float32)}, "weight"),
    ],
)
def test_a_wrong_projection_is_an_error_when_it_is_loaded(changed: dict[str, Any], message: str) -> None:
    matrix = random_matrix(np.random.default_rng(4), 4, 48, 64, 64)
    with pytest.raises(Exception, match=message) as raised:
        session(projection(matrix, **changed))
    assert re.search("Projection|type", str(raised.value))


def test_a_missing_attribute_is_an_error_that_names_it() -> None:
    proto = projection(random_matrix(np.random.default_rng(4), 4, 48, 64, 64))
    del proto.graph.node[0].attribute[1]
    with pytest.raises(Exception, match=r"phimoe\.native\.Projection the/node: the attribute [a-z_]+ is missing"):
        session(proto)


@pytest.mark.parametrize("shape", [(), (63,), (2, 65), (64, 1)])
def test_a_wrong_input_is_an_error_and_the_session_lives_on(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    matrix = random_matrix(rng, 4, 48, 64, 64)
    running = session(projection(matrix))
    with pytest.raises(Exception, match=re.escape(f"x is {list(shape)}, expected [..., 64]")):
        running.run(None, {"x": np.zeros(shape, np.float32)})
    x = rows(rng, 2, 64)
    np.testing.assert_array_equal(running.run(None, {"x": x})[0], matrix.multiply(x))


def test_weights_that_are_fed_are_checked_when_they_come() -> None:
    rng = np.random.default_rng(6)
    matrix = random_matrix(rng, 4, 48, 64, 64)
    fed = {"x": "float32", "weight": "uint8"}
    attributes = {"in_features": 64, "out_features": 48, "bits": 4, "superblock_size": 64}
    running = session(model("Projection", {}, fed, ["x", "weight"], **attributes))
    x = rows(rng, 2, 64)
    with pytest.raises(Exception, match=r"weight is \[2, 576\], expected \[3, 576\]"):
        running.run(None, {"x": x, "weight": matrix.strips()[:2]})
    np.testing.assert_array_equal(running.run(None, {"x": x, "weight": matrix.strips()})[0], matrix.multiply(x))


def test_sessions_run_side_by_side_and_outlive_each_other() -> None:
    rng = np.random.default_rng(7)
    matrices = [random_matrix(rng, bits, 96, 256, 128) for bits in (4, 8)]
    x = rows(rng, 9, 256)
    expected = [matrix.multiply(x) for matrix in matrices]
    sessions = [session(projection(matrix), 2) for matrix in matrices]
    with ThreadPoolExecutor(4) as threads:
        for i, [y] in enumerate(threads.map(lambda i: sessions[i % 2].run(None, {"x": x}), range(64))):
            np.testing.assert_array_equal(y, expected[i % 2])
    del sessions[0]
    np.testing.assert_array_equal(sessions[0].run(None, {"x": x})[0], expected[1])


def test_mapped_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("there is no /proc here")

    def anonymous() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]

    rng = np.random.default_rng(8)
    matrix = random_matrix(rng, 4, 64, 1024, 512)
    strips, copies = matrix.strips(), 6000
    data = np.tile(strips, (copies, 1))
    data.tofile(tmp_path / "weight.data")
    size = data.nbytes
    assert size > 200e6
    del data
    proto = projection(matrix, out_features=64 * copies)
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.dims[:] = [4 * copies, strips.shape[1]]
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weight.data", "offset": "0", "length": str(size)}.items():
        weight.external_data.add(key=key, value=value)
    onnx.save(proto, str(tmp_path / "model.onnx"))
    before = anonymous()
    running = session(tmp_path / "model.onnx")
    x = rows(rng, 1, 1024)
    [y] = running.run(None, {"x": x})
    assert anonymous() - before < 30e6
    np.testing.assert_array_equal(y.reshape(copies, 64), np.tile(matrix.multiply(x), (copies, 1)))


Experts = list[tuple[Matrix, Matrix, Matrix]]


def layer(
    rng: np.random.Generator, count: int, hidden: int, inner: int, bits: tuple[int, int] = (4, 4)
) -> tuple[Any, Experts]:
    """A router [E, H] and its experts: gate, up and down."""

    def one() -> tuple[Matrix, Matrix, Matrix]:
        gate, up = (random_matrix(rng, bits[0], inner, hidden, 64) for _ in range(2))
        return gate, up, random_matrix(rng, bits[1], hidden, inner, -(-inner // 64) * 64)

    return rows(rng, count, hidden) / np.float32(np.sqrt(hidden)), [one() for _ in range(count)]


def mixture_model(router: Any, experts: Experts, jitter: float = 0.01, /, **changed: Any) -> onnx.ModelProto:
    gate, _, down = experts[0]
    attributes = {
        "hidden_size": gate.codes.shape[1],
        "intermediate_size": gate.codes.shape[0],
        "num_experts": len(experts),
        "gate_up_bits": gate.bits,
        "down_bits": down.bits,
        "gate_up_superblock_size": gate.superblock_size,
        "down_superblock_size": down.superblock_size,
        "router_jitter_noise": jitter,
    }
    constants = {"router": router, "experts": np.stack([expert_bytes(*expert) for expert in experts])}
    constants |= {name: changed.pop(name) for name in tuple(changed) if name in constants}
    return model("SparseMixerMoE", constants, {"x": "float32"}, ["x", *constants], **attributes | changed)


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (2, 8), (3, 2)])
@pytest.mark.parametrize(("count", "hidden", "inner"), [(2, 64, 64), (16, 128, 96), (5, 200, 37)])
def test_a_mixture_of_experts_is_the_formats(bits: tuple[int, int], count: int, hidden: int, inner: int) -> None:
    rng = np.random.default_rng(count)
    router, experts = layer(rng, count, hidden, inner, bits)
    x = rows(rng, 2, 6, hidden)
    expected = mixture(x.reshape(12, hidden), router, experts, 0.01).reshape(x.shape)
    for threads in (1, 2):
        [y] = session(mixture_model(router, experts), threads).run(None, {"x": x})
        # a float32 exp may move an activation over a rounding boundary, by one step of 127
        assert np.abs(y - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.5])
def test_the_jitter_decides_which_rivals_count(jitter: float) -> None:
    rng = np.random.default_rng(9)
    router, experts = layer(rng, 8, 64, 64)
    x = rows(rng, 20, 64)
    expected = mixture(x, router, experts, jitter)
    [y] = session(mixture_model(router, experts, jitter)).run(None, {"x": x})
    assert np.abs(y - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_alone_is_the_same_token_among_many(threads: int) -> None:
    rng = np.random.default_rng(10)
    router, experts = layer(rng, 16, 192, 96)
    x = rows(rng, 300, 192)  # more rows of an expert than one block of a kernel
    running = session(mixture_model(router, experts), threads)
    [together] = running.run(None, {"x": x})
    for count in (2, 5, 16, 33):
        np.testing.assert_array_equal(running.run(None, {"x": x[:count]})[0], together[:count])
    for r in range(0, 300, 7):
        np.testing.assert_array_equal(running.run(None, {"x": x[r]})[0], together[r])
    [none] = running.run(None, {"x": x[:0]})
    assert none.shape == (0, 192)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("count", [1, 40])  # tokens: few experts, and all of them, whose pages are let go afterwards
def test_experts_whose_pages_were_dropped_give_the_same(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(11)
    router, experts = layer(rng, 8, 320, 960)
    x = rows(rng, count, 320)
    [expected] = session(mixture_model(router, experts), 2).run(None, {"x": x})
    proto = mixture_model(router, experts)
    weight = proto.graph.initializer[1]
    path = tmp_path / "model.scales.data"  # the name of files whose pages `released` drops
    path.write_bytes(bytes(64) + weight.raw_data)  # aligned as a bundle's; the last expert ends inside a page
    assert path.stat().st_size % mmap.PAGESIZE
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # only what is on the disk can be dropped
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": path.name, "offset": "64", "length": str(path.stat().st_size - 64)}.items():
        weight.external_data.add(key=key, value=value)
    onnx.save(proto, str(tmp_path / "model.onnx"))
    running = session(tmp_path / "model.onnx", 2)
    resident = []
    for _ in range(3):
        resident.append(_let_go(path))
        np.testing.assert_array_equal(running.run(None, {"x": x})[0], expected)
        resident.append(_resident(path))
    size = path.stat().st_size
    assert all(nbytes >= size // 8 for nbytes in resident[1::2])
    if not _on_tmpfs(tmp_path):  # whose files have no other place than memory
        assert not any(resident[::2])


def _let_go(path: Path) -> int:
    """Bytes of `path` that are in memory after its pages were dropped: several times, as the system may pass over pages
    that it is about to put on its lists.
    """
    for _ in range(50):
        with released(path.parent):
            pass
        if not _resident(path):
            break
    return _resident(path)


def _resident(path: Path) -> int:
    """Bytes of this process's mapping of `path` that are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(str(path)))
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))


def _on_tmpfs(folder: Path) -> bool:
    command = ["stat", "-fc", "%T", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "tmpfs"


def test_all_tokens_may_choose_the_same_experts() -> None:
    rng = np.random.default_rng(11)
    _, experts = layer(rng, 4, 64, 64)
    router = np.zeros((4, 64), np.float32)  # a tie: the lowest two
    x = rows(rng, 150, 64)
    [y] = session(mixture_model(router, experts), 2).run(None, {"x": x})
    expected = mixture(x, router, experts, 0.01)
    assert np.abs(y - expected).max() < 2e-3 * np.abs(expected).max()


def test_runs_of_one_mixture_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(12)
    router, experts = layer(rng, 8, 128, 64)
    running = session(mixture_model(router, experts), 2)
    x = [rows(rng, 1 + 13 * i % 40, 128) for i in range(24)]
    alone = [running.run(None, {"x": part})[0] for part in x]
    with ThreadPoolExecutor(4) as threads:
        for expected, [y] in zip(alone, threads.map(lambda part: running.run(None, {"x": part}), x), strict=True):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"router": np.zeros((3, 64), np.float32)}, r"router is \[3, 64\], expected \[4, 64\]"),
        ({"experts": np.zeros((4, 6), np.uint8)}, r"experts is \[4, 6\], expected \[4, 6912\]"),
        ({"num_experts": 1}, "num_experts is 1, expected 2 or more"),
        ({"intermediate_size": 80}, r"experts is \[4, 6912\], expected"),
        ({"down_bits": 1}, "down: codes of 1 bits"),
        ({"gate_up_superblock_size": 128}, "gate_up: superblocks of 128"),
        ({"router_jitter_noise": -1.0}, "router_jitter_noise is -1, expected 0 or more"),
        ({"router_jitter_noise": 1}, "router_jitter_noise is missing, or of another type"),
    ],
)
def test_a_wrong_mixture_is_an_error_when_it_is_loaded(changed: dict[str, Any], message: str) -> None:
    router, experts = layer(np.random.default_rng(13), 4, 64, 64)
    with pytest.raises(Exception, match=f"phimoe.native.SparseMixerMoE the/node: .*{message}"):
        session(mixture_model(router, experts, **changed))


def test_a_wrong_token_is_an_error() -> None:
    router, experts = layer(np.random.default_rng(13), 4, 64, 64)
    with pytest.raises(Exception, match=re.escape("x is [2, 65], expected [..., 64]")):
        session(mixture_model(router, experts)).run(None, {"x": np.zeros((2, 65), np.float32)})


def test_a_token_that_is_not_finite_gives_nan_alone() -> None:
    rng = np.random.default_rng(14)
    router, experts = layer(rng, 4, 64, 64)
    x = rows(rng, 3, 64)
    running = session(mixture_model(router, experts))
    [expected] = running.run(None, {"x": x})
    x[1, 5] = np.nan
    [y] = running.run(None, {"x": x})
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(("name", "said"), [("plain", "plain"), ("none-such", "PHIMOE_KERNELS is")])
def test_the_environment_names_the_kernels(name: str, said: str) -> None:
    code = """
import tests.test_native_operators as t
import numpy as np
print(t.operators.kernels())
matrix = t.random_matrix(np.random.default_rng(0), 4, 32, 64, 64)
x = np.ones((2, 64), np.float32)
try:
    print((t.session(t.projection(matrix)).run(None, dict(x=x))[0] == matrix.multiply(x)).all())
except Exception as error:
    print(error)
"""
    environment = os.environ | {"PHIMOE_KERNELS": name}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    first, second = ran.stdout.splitlines()[:2]
    assert said in first
    assert second == "True" if name == "plain" else f'{said} "none-such"' in second


@pytest.mark.parametrize("seed", range(8))
def test_attributes_of_any_value_never_end_the_process(seed: int) -> None:
    rng = np.random.default_rng(seed)
    router, experts = layer(rng, 4, 64, 64)
    matrix = random_matrix(rng, 4, 48, 64, 64)
    said: list[str] = []
    for _ in range(25):
        for proto, x in ((projection(matrix), rows(rng, 3, 64)), (mixture_model(router, experts), rows(rng, 3, 64))):
            attributes = [a for a in proto.graph.node[0].attribute if a.type == onnx.AttributeProto.INT]
            for attribute in rng.choice(attributes, rng.integers(1, 3), replace=False):
                near = attribute.i + int(rng.integers(-70, 70))
                attribute.i = int(rng.choice([near, near * 64, rng.integers(-(2**63), 2**63), 2**30, 2**24 + 1]))
            fed = rng.random() < 0.5  # weights that come with the run are checked there
            constants = {c.name: numpy_helper.to_array(c) for c in proto.graph.initializer} if fed else {}
            if fed:
                del proto.graph.initializer[:]
                for name, value in constants.items():
                    proto.graph.input.append(helper.make_tensor_value_info(name, TYPES[str(value.dtype)], None))
            try:
                session(proto).run(None, {"x": x} | constants)
            except Exception as error:
                said.append(str(error))
    assert said
    assert all("phimoe.native" in text and "bug" not in text for text in said), said
