"""The three ONNX functions, in onnx's reference evaluator and in ONNX Runtime, against modeling.py's functions of the
same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from phimoe_onnx import modeling
from phimoe_onnx.exporter.functions import DOMAIN, FUNCTIONS, OPSET

Arrays = list[NDArray[Any]]
Run = Callable[[bytes, dict[str, NDArray[Any]]], Arrays]


def in_reference(model: bytes, inputs: dict[str, NDArray[Any]]) -> Arrays:
    return ReferenceEvaluator(model).run(None, inputs)


def in_onnxruntime(model: bytes, inputs: dict[str, NDArray[Any]]) -> Arrays:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, inputs)


both = pytest.mark.parametrize("run", [in_reference, in_onnxruntime])


def call(run: Run, name: str, inputs: list[torch.Tensor], outputs: list[ir.DataType], **attributes: float) -> Arrays:
    """Runs one call of the function `name`."""
    arrays = {f"input_{n}": tensor.numpy() for n, tensor in enumerate(inputs)}
    values = [ir.val(name, ir.DataType.from_numpy(array.dtype), array.shape) for name, array in arrays.items()]
    results = [ir.Value(name=f"output_{n}", type=ir.TensorType(dtype)) for n, dtype in enumerate(outputs)]
    node = ir.node(name, values, attributes, domain=DOMAIN, outputs=results)
    graph = ir.Graph(values, results, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="call")
    model = ir.Model(graph, ir_version=10, functions=[function.clone() for function in FUNCTIONS])
    return run(ir.to_proto(model).SerializeToString(), arrays)


@both
@pytest.mark.parametrize(("past", "new"), [(0, 7), (5, 1), (4, 3)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (6, 1, 8), (3, 3, 4)])
def test_attention(run: Run, past: int, new: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """In a batch of two, with keys that are hidden at random, but never all of a query's."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, new, n * head_dim) for n in (heads, kv_heads, kv_heads))
    angles = torch.randn(2, new, head_dim // 2)
    cache = [torch.randn(2, kv_heads, past, head_dim) for _ in range(2)]
    visible = torch.rand(2, 1, new, past + new) < 0.6
    visible[..., 0] = True
    assert not visible.all()
    inputs = [query, key, value, angles.cos(), angles.sin(), *cache, visible]
    expected = modeling.attention(*inputs)
    got = call(run, "Attention", inputs, [ir.DataType.FLOAT] * 3, kv_heads=kv_heads, head_dim=head_dim)
    for array, tensor in zip(got, expected, strict=True):
        assert array.shape == tensor.shape
        np.testing.assert_allclose(array, tensor, atol=2e-6)


@both
def test_attention_of_a_query_that_sees_nothing_is_finite(run: Run) -> None:
    inputs = (
        [torch.ones(1, 2, 8)] * 3
        + [torch.ones(1, 2, 2)] * 2
        + [torch.zeros(1, 2, 0, 4)] * 2
        + [torch.zeros(1, 1, 2, 2).bool()]
    )
    output, *_ = call(run, "Attention", inputs, [ir.DataType.FLOAT] * 3, kv_heads=2, head_dim=4)
    assert np.isfinite(output).all()


@both
@pytest.mark.parametrize("jitter", [0.01, 0.1])
@pytest.mark.parametrize("number", [2, 5, 16])
def test_sparse_mixer(run: Run, number: int, jitter: float) -> None:
    torch.manual_seed(0)
    scores = torch.cat(
        [torch.randn(2, 50, number) * scale + shift for scale in (0.05, 1.0, 20.0) for shift in (-2.0, 0.0, 2.0)], dim=1
    )
    weights, chosen = modeling.sparse_mixer(scores, jitter)
    assert (weights < 0.99).any()  # some have near rivals
    got_weights, got_chosen = call(run, "SparseMixer", [scores], [ir.DataType.FLOAT, ir.DataType.INT64], jitter=jitter)
    assert np.array_equal(got_chosen, chosen)
    np.testing.assert_allclose(got_weights, weights, rtol=1e-5)


@both
def test_sparse_mixer_takes_the_lower_of_equal_scores(run: Run) -> None:
    scores = torch.tensor([[[2.0] * 4, [0.0] * 4, [1.0, 3.0, 3.0, 3.0], [5.0, 1.0, 1.0, -1.0]]])
    weights, chosen = modeling.sparse_mixer(scores, 0.01)
    got_weights, got_chosen = call(run, "SparseMixer", [scores], [ir.DataType.FLOAT, ir.DataType.INT64], jitter=0.01)
    assert got_chosen.tolist() == chosen.tolist() == [[[0, 1], [0, 1], [1, 2], [0, 1]]]
    np.testing.assert_allclose(got_weights, weights, rtol=1e-6)


@pytest.mark.parametrize("tokens", [(1, 1), (2, 6)])
def test_experts(tokens: tuple[int, int]) -> None:
    """The weights of experts that no token chose are NaN, so they cannot have been computed.

    Not in onnx's reference evaluator: a Loop without a condition does not run there at all, and no bundle holds this
    Loop.
    """
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(*tokens, 8), torch.randn(7, 2 * 12, 8), torch.randn(7, 8, 12)
    weights, chosen = torch.rand(*tokens, 2), torch.rand(*tokens, 4).topk(2).indices  # of the first four
    expected = modeling.experts(x, weights, chosen, gate_up, down)
    for unused in set(range(7)) - set(chosen.flatten().tolist()):
        gate_up[unused] = down[unused] = np.nan
    assert gate_up.isnan().any()
    (got,) = call(in_onnxruntime, "Experts", [x, weights, chosen, gate_up, down], [ir.DataType.FLOAT])
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-5)
