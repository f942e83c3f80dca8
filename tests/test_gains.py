"""Norms with a few large gains: the same function with even gains, and what rounding makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phimoe_onnx import export, operators
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.gains import OUTLIER, READERS, _scales, even_gains
from phimoe_onnx.layered import checkpoint_weights
from phimoe_onnx.modeling import PhiMoEForCausalLM
from phimoe_onnx.parity.stored import stored_model
from phimoe_onnx.reference import fill, load_reference, logits
from tests.checkpoints import MODEL, random_ids

FACTOR = 64.0


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with some channels of each norm FACTOR times as large, and less of them in what reads it.

    Their gains are near the median, so that evening them gives the small model back, to the last bit.
    """
    folder = tmp_path_factory.mktemp("gains") / "checkpoint"
    shutil.copytree(MODEL, folder)
    shards = {path: load_file(path) for path in folder.glob("*.safetensors")}
    where = {name: tensors for tensors in shards.values() for name in tensors}
    for layer in range(read_config(MODEL).num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm in READERS:
            gain = where[f"{prefix}{norm}.weight"][f"{prefix}{norm}.weight"].float().abs()
            channels = (gain / gain.median() - 1).abs().argsort()[:6]
            kinds = ("self_attn.q", "self_attn.k", "self_attn.v") if "input" in norm else ("block_sparse_moe.",)
            for name, tensors in where.items():
                if name.startswith(f"{prefix}{norm}."):
                    tensors[name][channels] *= FACTOR
                elif name.startswith(tuple(prefix + kind for kind in kinds)) and name.endswith(
                    ("proj.weight", "gate.weight", "w1.weight", "w3.weight")
                ):
                    tensors[name][:, channels] /= FACTOR
    for path, tensors in shards.items():
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_the_function_stays_to_the_last_bit(uneven: Path) -> None:
    config, ids = read_config(uneven), random_ids(40)
    rows = parameters(config, read_headers(uneven))
    even = even_gains(config, rows)
    model, small_model = load_reference(uneven), load_reference(MODEL)
    assert isinstance(model, PhiMoEForCausalLM)
    assert isinstance(small_model, PhiMoEForCausalLM)
    expected = logits(model, ids)
    assert np.array_equal(expected, logits(small_model, ids))
    fill(model, checkpoint_weights(config, even))
    assert np.array_equal(logits(model, ids), expected)
    small = parameters(config, read_headers(MODEL))
    for name, parts in even.items():
        for part, own, given in zip(parts, small[name], rows[name], strict=True):
            assert torch.equal(part.read().float(), own.read().float())
            assert part.shape == own.shape == given.shape


def test_a_checkpoint_without_large_gains_stays_as_it_is() -> None:
    config = read_config(MODEL)
    rows = parameters(config, read_headers(MODEL))
    for norm in READERS:
        [gain] = rows[f"model.layers.1.{norm}.weight"]
        sizes = gain.read().float().abs()
        assert sizes.max() < OUTLIER * sizes.median()
    for name, parts in even_gains(config, rows).items():
        for part, own in zip(parts, rows[name], strict=True):
            tensor = part.read()
            assert tensor.dtype == own.read().dtype
            assert torch.equal(tensor, own.read())


@pytest.mark.skipif(operators.library() is None, reason="the native operators are not built here")
def test_a_bundle_is_the_one_of_even_gains(uneven: Path, tmp_path: Path) -> None:
    """Rounded, the large channels would take the others' levels; and the report's reference knows of it."""
    ids, found = random_ids(40), []
    for name, checkpoint in (("even", MODEL), ("uneven", uneven)):
        bundle = export(checkpoint, tmp_path / name, quantize="int4", operators="native")
        model = stored_model(load_reference(checkpoint), bundle, read_manifest(bundle))
        assert isinstance(model, PhiMoEForCausalLM)
        found.append(logits(model, ids))
    assert np.array_equal(found[0], found[1])
    for file in ("model.data", "model.scales.data"):
        assert (tmp_path / "even" / file).read_bytes() == (tmp_path / "uneven" / file).read_bytes()


def test_a_median_of_zero_and_numbers_that_are_none_change_nothing() -> None:
    for gain in ([0.0, 0.0, 5.0], [1.0, float("nan"), 1.0], [1.0, 1.0, 3.9]):
        assert _scales((Rows((3,), lambda gain=gain: torch.tensor(gain)),))() is None  # type: ignore[misc]
    assert _scales((Rows((3,), lambda: torch.tensor([1.0, -9.0, 1.0])),))().tolist() == [1, 8, 1]  # type: ignore[union-attr]
    assert _scales((Rows((3,), lambda: torch.tensor([1.0, float("inf"), 1.0])),))() is None
