"""Checkpoints and bundles of the shapes in checkpoints.py, each made once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from phimoe_onnx.exporter import pipeline
from tests.checkpoints import SHAPES, at_level_0, write_checkpoint

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(shape) -> the folder of a random checkpoint; read it, do not change it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda shape: write_checkpoint(folder / shape, **SHAPES[shape]))


@pytest.fixture(scope="session")
def bundle(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """bundle(shape, target, quantize) -> the folder of its bundle; read it, do not change it."""
    folder = tmp_path_factory.mktemp("bundles")
    traced: dict[str, ir.Model] = {}  # tracing takes most of the time of so small an export

    def make(shape: str, target: str, quantize: str) -> Path:
        def trace(*arguments: Any) -> ir.Model:
            if shape not in traced:
                traced[shape] = original(*arguments)
            return traced[shape].clone()

        original = pipeline.trace
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "trace", trace)
            return pipeline.export(checkpoint(shape), folder / f"{shape}-{target}-{quantize}", target=target, quantize=quantize)

    return functools.cache(make)


@pytest.fixture(scope="session")
def bundle_at_level_0(bundle: Callable[[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """bundle_at_level_0(shape, quantize, graph) -> the bundle with that graph alone, its activations not rounded to int8."""
    folder = tmp_path_factory.mktemp("level-0")

    def make(shape: str, quantize: str, graph: str) -> Path:
        return at_level_0(bundle(shape, "cpu", quantize), folder / f"{shape}-{quantize}-{graph}", graph)

    return functools.cache(make)
