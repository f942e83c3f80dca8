"""--kv-cache int8 and int4: the graphs against PyTorch with the same rounding, and the loop over such a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from phimoe_onnx import ExportError, PhiMoE, export, reference
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.cli.verify import main as verify_main
from phimoe_onnx.config import read_config
from phimoe_onnx.exporter.passes.quantized_cache import DEVIATIONS, channel_scales
from phimoe_onnx.parity.stored import stored_model
from tests.checkpoints import MODEL, random_ids

Checkpoint = Callable[[str], Path]
LENGTH = 60  # past the rope boundary of 32 and the windows


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("bundles")

    def get(shape: str, kv_cache: str) -> Path:
        output = folder / f"{shape}-{kv_cache}"
        return output if output.exists() else export(checkpoint(shape), output, kv_cache=kv_cache)

    return get


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
@pytest.mark.parametrize("shape", ["plain", "no-bias", "heads", "longrope-window"])
def test_logits_are_those_of_rounded_keys_and_values(
    quantized: Callable[..., Path], checkpoint: Checkpoint, shape: str, kv_cache: str
) -> None:
    bundle = quantized(shape, kv_cache)
    exact = reference.load_reference(checkpoint(shape))
    ids = random_ids(LENGTH)
    expected = reference.logits(stored_model(exact, bundle, read_manifest(bundle)), ids)
    got = PhiMoE.load(bundle).logits(ids)
    close = np.isclose(got, expected, rtol=0, atol=1e-4 * expected.std()).all(axis=-1)
    # a value halfway between two codes may round the other way, and that token and its successors move
    assert close.mean() > 0.9
    assert close[:8].all()
    assert not np.allclose(got, reference.logits(exact, ids), rtol=0, atol=1e-4 * expected.std())


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_steps_batches_and_chunks_agree_with_one_pass(quantized: Callable[..., Path], kv_cache: str) -> None:
    model = PhiMoE.load(quantized("longrope-window", kv_cache))
    prompts = [random_ids(n, seed=n) for n in (5, 20, 40)]
    alone = [model.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
    assert [result.token_ids for result in model.generate(prompts, max_new_tokens=20)] == alone
    for prompt, new in zip(prompts, alone, strict=True):
        logits = model.logits([*prompt, *new])[-8:-1]  # of lengths on the same side of the boundary as the whole
        assert logits.argmax(axis=-1).tolist() == new[-7:]


@pytest.mark.parametrize(
    ("kv_cache", "dtype", "width"), [("none", "float32", 16), ("int8", "int8", 16), ("int4", "uint8", 8)]
)
def test_the_manifest_says_how_the_cache_is_stored(
    quantized: Callable[..., Path], kv_cache: str, dtype: str, width: int
) -> None:
    cache = read_manifest(quantized("plain", kv_cache)).decoding.cache
    assert (cache.dtype, cache.head_dim) == (dtype, width)


def test_scales_follow_from_the_weights(checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint("longrope"))
    rows = parameters(config, read_headers(checkpoint("longrope")))
    attention = reference.load_reference(checkpoint("longrope")).model.layers[1]
    gain, offset = attention.input_layernorm.weight, attention.input_layernorm.bias
    projection = attention.self_attn.v_proj
    mean = (projection.weight @ offset + projection.bias).abs()
    deviation = (projection.weight * gain).square().sum(dim=1).sqrt()
    scales = channel_scales(config, rows, "model.layers.1.", "v_proj", 8)
    torch.testing.assert_close(scales.flatten(), (mean + DEVIATIONS[8] * deviation) / 127)
    keys = channel_scales(config, rows, "model.layers.1.", "k_proj", 8)
    half = config.head_dim // 2
    assert torch.equal(keys[..., :half], keys[..., half:])  # rope turns the two into each other


@pytest.mark.parametrize(
    ("target", "kv_cache", "message"),
    [
        ("portable", "int8", "--target portable has no --kv-cache int8: the standard operators keep"),
        ("portable", "fp16", "--target portable has no --kv-cache fp16: the standard operators keep"),
        ("cpu", "fp16", "--target cpu has no --kv-cache fp16: ONNX Runtime's attention .*; use --operators native"),
        ("cuda", "fp16", "--target cuda has no --kv-cache fp16: its cache has the dtype of the activations, float16"),
        ("cpu", "int2", "kv_cache is 'int2', expected one of none, fp16, int8, int4"),
    ],
)
def test_what_a_target_does_not_keep_is_refused(
    tmp_path: Path, checkpoint: Checkpoint, target: str, kv_cache: str, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(checkpoint("plain"), tmp_path / "bundle", target=target, kv_cache=kv_cache)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_verify_passes(tmp_path: Path, kv_cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = export(MODEL, tmp_path / "bundle", quantize="int4", kv_cache=kv_cache, operators="stock")
    assert verify_main([str(bundle), "--reference", str(MODEL), "--tokens", "1024"]) == 0
    assert "passed" in capsys.readouterr().out
