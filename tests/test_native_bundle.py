"""Bundles whose graph holds operators of native/operators, as the runtime opens and runs them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
from onnx import helper

from phimoe_onnx import operators
from phimoe_onnx.bundle import NATIVE_OPERATORS, describe_files, read_manifest
from phimoe_onnx.errors import DeviceError
from phimoe_onnx.runtime import PhiMoE
from phimoe_onnx.runtime.ort import session
from tests.toy_bundle import ToyModel, write_bundle


@pytest.fixture
def native(tmp_path: Path) -> tuple[Path, ToyModel]:
    """The toy with our Attention in place of GroupQueryAttention."""
    folder = tmp_path / "native"
    toy = write_bundle(folder)
    model = onnx.load(folder / "model.onnx")
    changed = 0
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type, node.domain = "Attention", "phimoe.native"
            changed += 1
    assert changed
    model.opset_import.append(helper.make_opsetid("phimoe.native", 1))
    onnx.save(model, folder / "model.onnx")
    manifest = read_manifest(folder)
    graphs = tuple(dataclasses.replace(graph, requires=(NATIVE_OPERATORS,)) for graph in manifest.graphs)
    dataclasses.replace(manifest, graphs=graphs, files=describe_files(folder)).write(folder)
    return folder, toy


@pytest.mark.skipif(operators.library() is None, reason="the native operators are not built here")
def test_it_writes_the_exact_tokens_alone_and_in_batches_over_the_rope_boundary(native: tuple[Path, ToyModel]) -> None:
    folder, toy = native
    model = PhiMoE.load(folder, threads=1)
    prompts = [[9, 40, 17], [300, 12, 7, 45, 60, 31, 22, 8, 11, 290], [25] * 20]
    generations = model.generate(prompts, max_new_tokens=40)
    assert [generation.token_ids for generation in generations] == [toy.greedy(ids, 40) for ids in prompts]


def test_without_the_library_it_says_what_to_do(native: tuple[Path, ToyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PROVIDED", frozenset())
    with pytest.raises(
        DeviceError, match="install Rust's cargo and then phimoe-onnx again, or export with --operators"
    ):
        PhiMoE.load(native[0])


def test_a_library_that_cannot_be_loaded_is_an_error_that_names_it(
    native: tuple[Path, ToyModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_operators.so").write_bytes(b"\x7fELF, cut off")
    monkeypatch.setattr(operators, "library", lambda: tmp_path / "_operators.so")
    monkeypatch.setattr(session, "PROVIDED", frozenset({NATIVE_OPERATORS}))
    with pytest.raises(DeviceError, match=r"cannot load it on cpu: .*_operators\.so"):
        PhiMoE.load(native[0])
