"""The traced graph of a shape, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from phimoe_onnx.checkpoint import tensors as checkpoints
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.trace import trace


@pytest.fixture(scope="session")
def traced(checkpoint: Callable[[str], Path]) -> Callable[[str], ir.Model]:
    """traced(shape) -> a fresh copy of the traced graph."""
    models: dict[str, ir.Model] = {}

    def copy(shape: str) -> ir.Model:
        if shape not in models:
            folder = checkpoint(shape)
            config = read_config(folder)
            rows = checkpoints.parameters(config, checkpoints.read_headers(folder))
            models[shape] = trace(config, rows, ir.DataType.FLOAT)
        return models[shape].clone()

    return copy
