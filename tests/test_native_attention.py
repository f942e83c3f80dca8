"""The operator Attention of native/operators against ONNX Runtime's own GroupQueryAttention."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from phimoe_onnx import operators

ort = pytest.importorskip("onnxruntime")
LIBRARY = operators.library()
if LIBRARY is None:
    pytest.skip("the native operators are not built here", allow_module_level=True)

HEADS, KV_HEADS, SIZE, POSITIONS = 4, 2, 32, 200
NAMES = ["query", "", "", "past_key", "past_value", "seqlens_k", "total", "cos", "sin", "position_ids"]
SCALES = ["", "", "k_scale", "v_scale"]
PER_CHANNEL = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
OUTPUTS = ["output", "present_key", "present_value"]
HALF, INT8 = TensorProto.FLOAT16, TensorProto.INT8


def session(
    domain: str, without: tuple[str, ...] = (), threads: int = 1, cache: int = TensorProto.FLOAT, **attributes: Any
) -> Any:
    """One node, GroupQueryAttention or ours; inputs are fed, but for those in `without`."""
    names = ["" if name in without else name for name in (NAMES + SCALES if cache == INT8 else NAMES)]
    while not names[-1]:
        names.pop()
    op_type = "Attention" if domain == "phimoe.native" else "GroupQueryAttention"
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": int("cos" not in without)} | attributes
    node = helper.make_node(op_type, names, OUTPUTS, name="the/node", domain=domain, **attributes)
    types = {"seqlens_k": TensorProto.INT32, "total": TensorProto.INT32, "position_ids": TensorProto.INT64}
    types |= dict.fromkeys(("past_key", "past_value", "present_key", "present_value"), cache)
    inputs = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None if name != "total" else [1])
        for name in names
        if name
    ]
    outputs = [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None) for name in OUTPUTS]
    graph = helper.make_graph([node], "graph", inputs, outputs)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(LIBRARY))
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass
class Feed:
    """What a pass over rows of `past` cached and `tokens` new ones is given; `room` is P."""

    rng: np.random.Generator
    past: list[int]
    tokens: int
    room: int

    def __post_init__(self) -> None:
        angles = self.rng.uniform(-3, 3, (POSITIONS, SIZE // 2)).astype(np.float32)
        batch = len(self.past)
        shape = (batch, KV_HEADS, self.room, SIZE)
        total = [past + self.tokens for past in self.past]
        self.values: dict[str, Any] = {
            "query": self.normal(batch, self.tokens, (HEADS + 2 * KV_HEADS) * SIZE),
            "past_key": self.normal(*shape),
            "past_value": self.normal(*shape),
            "seqlens_k": np.array(total, np.int32) - 1,
            "total": np.array([max(total)], np.int32),
            "cos": np.cos(angles),
            "sin": np.sin(angles),
            "position_ids": self.rng.integers(0, POSITIONS - self.tokens, (batch, 1)) + np.arange(self.tokens),
        }

    def normal(self, *shape: int) -> Any:
        """Random numbers."""
        return self.rng.standard_normal(shape, np.float32)

    def without(self, *names: str) -> dict[str, Any]:
        """The inputs but for these."""
        return {name: value for name, value in self.values.items() if name not in names}


def assert_same(found: list[Any], stock: list[Any], lengths: list[int]) -> None:
    np.testing.assert_allclose(found[0], stock[0], rtol=0, atol=3e-6)
    for ours, theirs in zip(found[1:], stock[1:], strict=True):
        assert ours.shape == theirs.shape
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(ours[b, :, :length], theirs[b, :, :length], rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [-1, 1, 5, 60])
@pytest.mark.parametrize("without", [("position_ids",), (), ("cos", "sin", "position_ids")])
@pytest.mark.parametrize(
    ("past", "tokens", "room"), [([37], 1, 37), ([41, 3, 17], 1, 41), ([20], 30, 20), ([0], 33, 0)]
)
def test_it_computes_what_group_query_attention_does(
    past: list[int], tokens: int, room: int, without: tuple[str, ...], window: int
) -> None:
    feed = Feed(np.random.default_rng(1), past, tokens, room)
    given = feed.without(*without)
    stock = session("com.microsoft", without, local_window_size=window).run(None, given)
    for threads in (1, 2):
        found = session("phimoe.native", without, threads, local_window_size=window).run(None, given)
        assert_same(found, stock, [length + tokens for length in past])


def test_a_first_prompt_of_rows_padded_on_the_right() -> None:
    feed = Feed(np.random.default_rng(2), [0, 0, 0], 12, 0)
    feed.values["seqlens_k"] = np.array([11, 4, 0], np.int32)
    given = feed.without("position_ids")
    found, stock = (session(name, ("position_ids",)).run(None, given) for name in ("phimoe.native", "com.microsoft"))
    for b, length in enumerate([12, 5, 1]):
        np.testing.assert_allclose(found[0][b, :length], stock[0][b, :length], rtol=0, atol=3e-6)
        for ours, theirs in zip(found[1:], stock[1:], strict=True):
            np.testing.assert_allclose(ours[b, :, :length], theirs[b, :, :length], rtol=0, atol=1e-6)


def test_without_a_past_there_are_first_prompts_alone() -> None:
    without = ("past_key", "past_value", "position_ids")
    given = Feed(np.random.default_rng(3), [0, 0], 9, 0).without(*without)
    found, stock = (session(name, without).run(None, given) for name in ("phimoe.native", "com.microsoft"))
    assert_same(found, stock, [9, 9])


def test_the_scale_may_be_given() -> None:
    given = Feed(np.random.default_rng(3), [5], 4, 5).values
    found, stock = (session(name, scale=0.5).run(None, given) for name in ("phimoe.native", "com.microsoft"))
    assert_same(found, stock, [9])


def quantized(feed: Feed, *without: str) -> dict[str, Any]:
    """The feed with an int8 cache and its channels' scales."""
    values = feed.without(*without)
    for part in ("key", "value"):
        shape = values[f"past_{part}"].shape
        values[f"past_{part}"] = feed.rng.integers(-128, 128, shape).astype(np.int8)
        values[f"{part[0]}_scale"] = feed.rng.uniform(0.01, 0.04, (1, KV_HEADS, 1, SIZE)).astype(np.float32)
    return values


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("without", [("position_ids",), ("cos", "sin", "position_ids")])
@pytest.mark.parametrize(("past", "tokens", "room"), [([41, 3, 17], 1, 41), ([20], 30, 20), ([0], 33, 0)])
def test_an_int8_cache(past: list[int], tokens: int, room: int, without: tuple[str, ...], window: int) -> None:
    given = quantized(Feed(np.random.default_rng(8), past, tokens, room), *without)
    stock = session("com.microsoft", without, cache=INT8, local_window_size=window, **PER_CHANNEL).run(None, given)
    for threads in (1, 2):
        running = session("phimoe.native", without, threads, cache=INT8, local_window_size=window)
        found = running.run(None, given)
        np.testing.assert_allclose(found[0], stock[0], rtol=0, atol=0.02)  # a code may round the other way
        assert np.median(np.abs(found[0] - stock[0])) < 1e-5
        for ours, theirs in zip(found[1:], stock[1:], strict=True):
            assert ours.dtype == theirs.dtype == np.int8
            for b, length in enumerate(past):
                apart = ours[b, :, : length + tokens].astype(int) - theirs[b, :, : length + tokens]
                assert np.abs(apart).max() <= 1
                assert (apart != 0).mean() < 1e-3


def halved(feed: Feed, *without: str) -> dict[str, Any]:
    """The feed with a float16 cache."""
    past = {name: feed.values[name].astype(np.float16) for name in ("past_key", "past_value")}
    return feed.without(*without) | past


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("without", [("position_ids",), ("cos", "sin", "position_ids")])
@pytest.mark.parametrize(("past", "tokens", "room"), [([41, 3, 17], 1, 41), ([20], 30, 20), ([0], 33, 0)])
def test_a_float16_cache(past: list[int], tokens: int, room: int, without: tuple[str, ...], window: int) -> None:
    given = halved(Feed(np.random.default_rng(10), past, tokens, room), *without)
    floats = given | {name: given[name].astype(np.float32) for name in ("past_key", "past_value")}
    stock = session("com.microsoft", without, cache=HALF, local_window_size=window).run(None, given)
    exact = session("phimoe.native", without, local_window_size=window).run(None, floats)
    for threads in (1, 2):
        found = session("phimoe.native", without, threads, cache=HALF, local_window_size=window).run(None, given)
        np.testing.assert_allclose(found[0], stock[0], rtol=0, atol=2e-3)  # whose sums are less exact
        for ours, theirs in zip(found[1:], exact[1:], strict=True):
            for b, length in enumerate(past):  # of those numbers, each the nearest float16
                written = theirs[b, :, : length + tokens].astype(np.float16)
                np.testing.assert_array_equal(ours[b, :, : length + tokens].view(np.uint16), written.view(np.uint16))
        if "cos" in without:
            np.testing.assert_allclose(found[0], attended(given["query"], found[1:], past, window), rtol=0, atol=3e-6)


def attended(packed: Any, presents: list[Any], past: list[int], window: int) -> Any:
    """Softmax attention of the queries, which are not turned, over the cache's numbers: float64 [B, S, H * D]."""
    queries = packed[:, :, : HEADS * SIZE].reshape(*packed.shape[:2], HEADS, SIZE).astype(np.float64)
    keys, values = (np.repeat(present.astype(np.float64), HEADS // KV_HEADS, axis=1) for present in presents)
    out = np.empty_like(queries)
    for b, t, head in np.ndindex(out.shape[:3]):
        end = past[b] + t + 1
        seen = slice(0 if window < 0 else max(end - window, 0), end)
        weights = np.exp(keys[b, head, seen] @ queries[b, t, head] / np.sqrt(SIZE))
        out[b, t, head] = weights @ values[b, head, seen] / weights.sum()
    return out.reshape(*packed.shape[:2], -1)


def test_an_int8_cache_of_many_tokens_at_once_is_that_of_one_by_one() -> None:
    past, tokens = [21, 30, 2], 16
    given = quantized(Feed(np.random.default_rng(9), past, tokens, 30))
    running = session("phimoe.native", cache=INT8, local_window_size=9)
    together, *_ = running.run(None, given)
    caches = {name: given[name] for name in ("past_key", "past_value")}
    for t in range(tokens):
        step = given | {
            "query": given["query"][:, t : t + 1],
            "position_ids": given["position_ids"][:, t : t + 1],
            "seqlens_k": np.array(past, np.int32) + t,
            "total": np.array([max(past) + t + 1], np.int32),
        }
        alone, caches["past_key"], caches["past_value"] = running.run(None, step | caches)
        np.testing.assert_array_equal(alone[:, 0].view(np.uint32), together[:, t].view(np.uint32))


@pytest.mark.parametrize(
    ("cache", "changed", "message"),
    [
        (INT8, {"k_scale": np.ones((1, 2, 1, 8), np.float32)}, "k_scale is [1, 2, 1, 8], expected [1, 2,"),
        (INT8, {"v_scale": None}, "v_scale is missing, expected for int8 keys"),
    ],
)
def test_wrong_scales_are_errors(cache: int, changed: dict[str, Any], message: str) -> None:
    given = quantized(Feed(np.random.default_rng(6), [8, 3], 1, 9)) | changed
    without = tuple(name for name, value in given.items() if value is None)
    with pytest.raises(Exception, match="phimoe.native.Attention the/node: .*" + re.escape(message)):
        session("phimoe.native", without, cache=cache).run(None, {n: v for n, v in given.items() if v is not None})


def bound(running: Any, values: dict[str, Any], keys: Any, cached: Any) -> Any:
    """A pass over one buffer that is past and present; returns the output."""
    binding = running.io_binding()
    for name, value in values.items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, value)
    for part, buffer in (("key", keys), ("value", cached)):
        place = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        binding.bind_input(f"past_{part}", *place)
        binding.bind_output(f"present_{part}", *place)
    binding.bind_output("output")
    running.run_with_iobinding(binding)
    return binding.get_outputs()[OUTPUTS.index("output") + 2].numpy()


@pytest.mark.parametrize("window", [-1, 7])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cache", [TensorProto.FLOAT, HALF])
def test_many_tokens_at_once_are_the_same_as_one_by_one_to_the_last_bit(window: int, threads: int, cache: int) -> None:
    past, tokens, room = [21, 30, 2], 16, 64
    feed = Feed(np.random.default_rng(4), past, tokens, room)
    if cache == HALF:
        feed.values = halved(feed)
    running = session("phimoe.native", threads=threads, cache=cache, local_window_size=window)
    keys, cached = feed.values["past_key"].copy(), feed.values["past_value"].copy()
    together = bound(running, feed.values, keys, cached)
    assert (keys[:, :, 50:] == feed.values["past_key"][:, :, 50:]).all()  # nothing else is written
    one_keys, one_cached = feed.values["past_key"].copy(), feed.values["past_value"].copy()
    for t in range(tokens):
        values = feed.values | {
            "query": np.ascontiguousarray(feed.values["query"][:, t : t + 1]),
            "position_ids": np.ascontiguousarray(feed.values["position_ids"][:, t : t + 1]),
            "seqlens_k": np.array(past, np.int32) + t,
            "total": np.array([max(past) + t + 1], np.int32),
        }
        alone = bound(running, values, one_keys, one_cached)
        np.testing.assert_array_equal(alone[:, 0].view(np.uint32), together[:, t].view(np.uint32))
    np.testing.assert_array_equal(one_keys, keys)
    np.testing.assert_array_equal(one_cached, cached)


def test_what_the_window_does_not_hold_is_not_read() -> None:
    feed = Feed(np.random.default_rng(5), [40], 2, 42)
    running = session("phimoe.native", local_window_size=6)
    keys, cached = feed.values["past_key"].copy(), feed.values["past_value"].copy()
    expected = bound(running, feed.values, keys, cached)
    keys, cached = feed.values["past_key"].copy(), feed.values["past_value"].copy()
    for buffer in (keys, cached):
        buffer[:, :, :35] = np.nan
    np.testing.assert_array_equal(bound(running, feed.values, keys, cached), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": np.zeros((2, 1, 250), np.float32)}, "query is [2, 1, 250], expected [batch, tokens, 8 * the size"),
        ({"query": np.zeros((2, 1, 8 * 24), np.float32)}, "heads of 24 floats; expected a multiple of 16"),
        ({"query": np.zeros((3, 1, 256), np.float32)}, "past_key is [2, 2, 9, 32]"),
        ({"past_value": np.zeros((2, 2, 8, 32), np.float32)}, "past_value is [2, 2, 8, 32]"),
        ({"seqlens_k": np.array([5], np.int32)}, "seqlens_k is [1], expected [2]"),
        ({"seqlens_k": np.array([5, -1], np.int32)}, "seqlens_k holds -1, expected at least 0 and below 9"),
        ({"seqlens_k": np.array([5, 9], np.int32)}, "seqlens_k holds 9, expected at least 0 and below 9"),
        ({"total": np.array([0], np.int32)}, "total_sequence_length is 0, expected 1 or more"),
        ({"total": np.array([-5], np.int32)}, "total_sequence_length is -5, expected 1 or more"),
        ({"total": np.array([90], np.int32), "seqlens_k": np.array([5, 80], np.int32)}, "room for 9 before them"),
        ({"cos": np.zeros((200, 8), np.float32)}, "cos_cache is [200, 8]"),
        ({"position_ids": np.array([[0], [200]])}, "a token is at position 200, expected 0 to below 200"),
        ({"position_ids": np.array([[0], [-1]])}, "a token is at position -1"),
        ({"position_ids": np.array([[0, 1]])}, "position_ids is [1, 2], expected [2, 1]"),
    ],
)
def test_wrong_inputs_are_errors(changed: dict[str, Any], message: str) -> None:
    feed = Feed(np.random.default_rng(6), [8, 3], 1, 9)
    running = session("phimoe.native")
    with pytest.raises(Exception, match="phimoe.native.Attention the/node: .*" + re.escape(message)):
        running.run(None, feed.values | changed)
    running.run(None, feed.values)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"kv_num_heads": 3}, "num_heads is 4, expected a multiple of kv_num_heads, which is 3"),
        ({"num_heads": 0}, "num_heads is 0, expected 1"),
        ({"rotary_interleaved": 1}, "rotary_interleaved is 1, expected 0"),
        ({"local_window_size": 0}, "local_window_size is 0, expected -1, or 1 or more"),
    ],
)
def test_wrong_attributes_are_errors(attributes: dict[str, int], message: str) -> None:
    with pytest.raises(Exception, match=message):
        session("phimoe.native", **attributes)


def test_buffers_that_overlap_in_part_are_an_error() -> None:
    feed = Feed(np.random.default_rng(7), [8], 1, 9)
    running = session("phimoe.native")
    memory = np.zeros(2 * feed.values["past_key"].size, np.float32)
    binding = running.io_binding()
    shape = feed.values["past_key"].shape
    for name, value in feed.values.items():
        if name != "past_key":
            binding.bind_cpu_input(name, value)
    binding.bind_input("past_key", "cpu", 0, np.float32, shape, memory.ctypes.data)
    binding.bind_output("present_key", "cpu", 0, np.float32, shape, memory.ctypes.data + 128)
    for name in ("output", "present_value"):
        binding.bind_output(name)
    with pytest.raises(Exception, match="overlap in memory"):
        running.run_with_iobinding(binding)
