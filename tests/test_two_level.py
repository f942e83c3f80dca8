"""Two-level rounding: PyTorch and the native library give the same bytes, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from phimoe_onnx import operators
from phimoe_onnx.errors import CheckpointError, ExportError
from phimoe_onnx.exporter.quantize import two_level, two_level_native
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.strips import Strips, superblock_size
from phimoe_onnx.exporter.quantize.two_level import laid_out, round_two_level, split

FORMS = (Strips(4), Strips(8), Format(4, 32), Format(8, 16), Format(4, 16, "bfloat16"))
built = pytest.mark.skipif(operators.library() is None, reason="the library of the native operators is not built here")


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the library is not built."""
    with monkeypatch.context() as context:
        context.setattr(two_level_native, "function", lambda: None)
        yield


def matrices(n: int, k: int) -> dict[str, Tensor]:
    """Matrices that are not like each other, float32."""
    generator = torch.Generator().manual_seed(n * k)
    usual = torch.randn(n, k, generator=generator)
    chance = torch.rand(n, k, generator=generator)
    return {
        "usual": usual,
        "positive": usual.abs(),
        "zeros": torch.zeros(n, k),
        "one number": torch.full((n, k), 0.3),
        "integers": (usual * 3).round(),
        "sparse": usual * (chance < 0.05),
        "outliers": usual * torch.where(chance < 0.01, 100.0, 1.0),
        "rows apart": usual * 2.0 ** torch.arange(-40, 40, 80 / n)[:n, None],
        "tiny": usual * 1e-38,
        "denormal": usual * 1e-42,
        "huge": usual.clamp(-3, 3) * 1.1e38,
        "from denormal to huge": usual.clamp(-3, 3) * 10.0 ** (chance * 83 - 45),
    }


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (3, 96), (20, 448), (33, 48), (18, 1024)])
def test_the_library_gives_the_bytes_that_pytorch_gives(
    n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, numbers in matrices(n, k).items():
        if dtype != torch.float32 and name not in ("usual", "outliers", "denormal", "rows apart"):
            continue
        rows = numbers.to(dtype)
        if not rows.isfinite().all():
            continue
        for form in FORMS:
            ours = round_two_level(rows, form, "", None)
            with monkeypatch.context() as context:
                context.setattr(two_level_native, "function", lambda: None)
                theirs = round_two_level(rows, form, "", None)
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (name, form)


@built
def test_rows_that_are_not_one_piece() -> None:
    """Columns of a larger matrix, a transposed one, and float64."""
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(1))
    for rows in (weight[:, 32:160], weight.T, weight.double()):
        ours = round_two_level(rows, Strips(4), "", None)[0]
        assert torch.equal(ours, round_two_level(rows.float().clone(), Strips(4), "", None)[0])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", [Strips(4), Format(8, 32)], ids=str)
def test_a_number_that_is_none_is_an_error_that_names_the_matrix(
    number: float, form: Strips | Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = torch.ones(17, 96, dtype=dtype)
        rows[16, 95] = number
        with pytest.raises(CheckpointError, match=r"model\.x, expert 3, holds numbers that are not finite"):
            round_two_level(rows, form, "model.x", 3)
        with monkeypatch.context() as context:
            context.setattr(two_level_native, "function", lambda: None)
            with pytest.raises(CheckpointError, match=r"^model\.x holds numbers that are not finite"):
                round_two_level(rows, form, "model.x", None)


@built
def test_kernels_that_there_are_not_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library looks at PHIMOE_KERNELS once a process, so its answer is played here."""
    monkeypatch.setattr(two_level_native, "function", lambda: lambda *_: two_level_native.NO_KERNELS)
    monkeypatch.setattr(operators, "kernels", lambda: "PHIMOE_KERNELS is 'abacus'")
    with pytest.raises(ExportError, match=r"^PHIMOE_KERNELS is 'abacus'$"):
        round_two_level(torch.ones(16, 64), Strips(4), "", None)


def test_a_library_without_the_function_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    two_level_native.function.cache_clear()
    monkeypatch.setattr(operators, "library", lambda: Path(np.__file__).parent / "no" / "such" / "file.so")
    monkeypatch.setattr(two_level_native.ctypes, "CDLL", lambda path: object())
    try:
        assert two_level_native.function() is None
    finally:
        two_level_native.function.cache_clear()


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pytorch_alone(form: Strips | Format) -> None:
    weight = torch.randn(40, 960, generator=torch.Generator().manual_seed(2))
    stored = round_two_level(weight, form, "", None)
    back = form.unpack(stored[0], 40, 960) if isinstance(form, Strips) else form.dequantize(*stored)
    assert (back - weight).square().mean() < (0.008 if form.bits == 4 else 7e-5)


def test_the_loss_is_what_it_was() -> None:
    """Squared errors, x 1000, of the weights' squares: five shares and three neighbours gave 7.742 and 12.728."""
    generator = np.random.default_rng(3)
    for expected, numbers in (7.735, generator.standard_normal), (12.724, lambda shape: generator.standard_t(5, shape)):
        weight = torch.from_numpy(numbers((256, 4096))).float()
        back = Strips(4).unpack(round_two_level(weight, Strips(4), "", None)[0], 256, 4096)
        assert 1000 * (back - weight).square().mean() / weight.square().mean() < expected


@pytest.mark.parametrize("k", [64, 96, 448, 960])
def test_both_levels_follow_from_their_products(k: int) -> None:
    """So a bundle with the products alone becomes one with both, the same as from the checkpoint."""
    for name, weight in matrices(32, k).items():
        size = superblock_size(k) // 32
        blocks = -(-k // 32)
        levels, s, outer = two_level._fit(weight, 4)
        assert torch.equal(laid_out(Strips(4), levels, s, outer)[0], round_two_level(weight, Strips(4), "", None)[0])
        _, scales = laid_out(Format(4, 16), levels, s, outer)
        scales = torch.nn.functional.pad(scales[:, ::2], (0, -blocks % size)).view(32, -1, size)
        found = split(scales)
        assert torch.equal(found[0], outer), name
        assert torch.equal(found[1].view(32, -1)[:, :blocks], s), name


def test_scales_of_no_two_levels_are_told() -> None:
    assert split(torch.tensor([[0.5, 0.1]]))[0].isnan().all()
    assert split(torch.tensor([[1.0, 1 / 16]]))[0].isnan().all()
    outer, s = split(torch.tensor([[7.5, 1.5, 0.0], [0.0, 0.0, 0.0], [2.0, 2.0, 4.0]]))
    assert outer.tolist() == [0.5, 0.0, 0.5]
    assert s.tolist() == [[15, 3, 0], [0, 0, 0], [4, 4, 8]]
