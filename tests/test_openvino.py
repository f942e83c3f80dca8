"""Portable bundles in OpenVINO; noxfile.py installs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phimoe_onnx import reference
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.parity.stored import stored_model
from tests.checkpoints import assert_close, feeds, random_ids

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("shape", ["plain", "tied", "head_dim"])
@pytest.mark.parametrize("form", ["none", "int8", "int4"])
def test_logits_are_pytorchs(
    checkpoint: Callable[..., Path], bundle: Callable[..., Path], shape: str, form: str
) -> None:
    folder = bundle(shape, "portable", form)
    model = stored_model(reference.load_reference(checkpoint(shape)), folder, read_manifest(folder))
    core = openvino.Core()
    precision = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", precision)
    for length in (1, 40):
        ids = random_ids(length)
        found = compiled(feeds(model.config, [ids]))["logits"]
        assert_close(found[0], reference.logits(model, ids))
