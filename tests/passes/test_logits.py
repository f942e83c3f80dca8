"""AddOptionalInputs and RequireInputs: the last positions' logits, and inputs that have no default."""

from __future__ import annotations

import numpy as np
import pytest

from phimoe_onnx.bundle import OPTIONAL_INPUTS
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.passes.logits import AddOptionalInputs, RequireInputs
from tests.checkpoints import assert_close
from tests.passes.graphs import Checkpoint, Traced, change, run


@pytest.mark.parametrize("shape", ["plain", "longrope", "no-bias", "tied"])
def test_add_optional_inputs(traced: Traced, checkpoint: Checkpoint, shape: str) -> None:
    model, config = traced(shape), read_config(checkpoint(shape))
    expected, *presents = run(model, config)
    assert change(model, AddOptionalInputs()) == {"Slice": 1, "Neg": 1, "ConstantOfShape": 1, "Shape": 1}
    for keep, kept in ((0, 45), (1, 1), (7, 7)):
        logits, *got = run(model, config, rope_length=False, logits_to_keep=keep)
        assert logits.shape == (1, kept, 2048)
        assert_close(logits, expected[:, -kept:])
        assert all(np.array_equal(a, b) for a, b in zip(got, presents, strict=True))


def test_require_inputs(traced: Traced) -> None:
    model = traced("plain")
    AddOptionalInputs()(model)
    assert set(OPTIONAL_INPUTS) <= set(model.graph.initializers)
    assert RequireInputs()(model).modified
    assert not set(OPTIONAL_INPUTS) & set(model.graph.initializers)
    assert set(OPTIONAL_INPUTS) <= {value.name for value in model.graph.inputs}
