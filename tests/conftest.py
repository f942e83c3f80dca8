"""Checkpoints and bundles of the shapes in checkpoints.py, each made once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phimoe_onnx.exporter import pipeline
from tests.captures import keep_captures
from tests.checkpoints import SHAPES, TASKS, at_level_0, write_checkpoint

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other
keep_captures()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(shape, task="text-generation") -> the folder of a random checkpoint; read it, do not change it."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make(shape: str, task: str) -> Path:
        return write_checkpoint(folder / task / shape, **SHAPES[shape] | TASKS[task])

    return lambda shape, task="text-generation": make(shape, task)


@pytest.fixture(scope="session")
def bundle(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """bundle(shape, target, quantize, task="text-generation", rounding=None) -> the folder of its bundle, of stock
    operators; do not change it.
    """
    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def make(shape: str, target: str, quantize: str, task: str, rounding: str | None) -> Path:
        output = folder / task / f"{shape}-{target}-{quantize}-{rounding}"
        options: dict[str, Any] = {"target": target, "quantize": quantize, "rounding": rounding, "operators": "stock"}
        return pipeline.export(checkpoint(shape, task), output, **options)

    return lambda shape, target, quantize, task="text-generation", rounding=None: make(
        shape, target, quantize, task, rounding
    )


@pytest.fixture(scope="session")
def bundle_at_level_0(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """bundle_at_level_0(shape, quantize, graph, task="text-generation") -> that graph alone, its activations not
    rounded to int8.
    """
    folder = tmp_path_factory.mktemp("level-0")

    @functools.cache
    def make(shape: str, quantize: str, graph: str, task: str) -> Path:
        return at_level_0(bundle(shape, "cpu", quantize, task), folder / f"{task}-{shape}-{quantize}-{graph}", graph)

    return lambda shape, quantize, graph, task="text-generation": make(shape, quantize, graph, task)
