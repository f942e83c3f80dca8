"""Strips and two-level scales, held against a reader that goes through native/FORMAT.md a weight at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.levels import round_to_levels
from phimoe_onnx.exporter.quantize.rtn import round_to_nearest
from phimoe_onnx.exporter.quantize.strips import Strips, expert_bytes, pack_expert, superblock_size, unpack_expert
from phimoe_onnx.exporter.quantize.two_level import round_two_level

# of normal numbers, relative to their square; 4 and 8 levels of one scale give 0.118 and 0.035 at best (Max 1960)
ERRORS = {2: 0.115, 3: 0.0295, 4: 0.0088, 8: 7e-5}


def read(data: bytes, bits: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels [n, k], s [n, k] and S [n, k], each weight's own."""
    tiles = (k + 63) // 64
    size = max(64 * each for each in range(1, 9) if tiles % each == 0)
    superblocks = tiles * 64 // size
    header = 32 * superblocks + (16 * tiles if bits < 8 else 0)
    header += -header % 64
    strip = header + tiles * 64 * 16 * bits // 8
    assert len(data) == (n + 15) // 16 * strip
    levels, s, S = np.zeros((n, k), int), np.ones((n, k), int), np.zeros((n, k), np.float32)
    for row in range(n):
        start, column = row // 16 * strip, row % 16
        for i in range(k):
            g, tile, inside = i // size, i // 64, i % 64
            outer = data[start + 32 * g + 2 * column :][:2]
            S[row, i] = np.frombuffer(b"\0\0" + outer, "<f4")[0]
            codes = data[start + header + 128 * bits * tile :][: 128 * bits]
            if bits < 8:
                pair = data[start + 32 * superblocks + 16 * tile + column]
                s[row, i] = pair & 15 if inside < 32 else pair >> 4
            if bits < 4:
                code = codes[inside % 16 // 4 * 64 + 4 * column + i % 4] >> 2 * (inside // 16) & 3
                if bits == 3:
                    code |= (codes[256 + inside % 8 // 4 * 64 + 4 * column + i % 4] >> inside // 8 & 1) << 2
                levels[row, i] = {2: (-7, -2, 2, 7), 3: (-8, -5, -3, -1, 1, 3, 5, 8)}[bits][code]
            elif bits == 4:
                byte = data[start + header + 512 * tile + inside % 32 // 4 * 64 + 4 * column + i % 4]
                levels[row, i] = (byte & 15 if inside < 32 else byte >> 4) - 8
            else:
                byte = data[start + header + 1024 * tile + inside // 4 * 64 + 4 * column + i % 4]
                levels[row, i] = byte - 256 if byte > 127 else byte
    return levels, s, S


@pytest.mark.parametrize("bits", ERRORS)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (20, 96), (33, 160), (16, 192), (7, 448), (16, 960)])
def test_strips_are_laid_out_as_the_contract_says(bits: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) * 0.02
    weight[0, :32] = 0
    form = Strips(bits)
    (packed,) = round_to_levels(weight, form, "", None)
    assert (packed.numel(),) == form.nbytes(n, k)
    levels, s, S = read(packed.numpy().tobytes(), bits, n, k)
    expected = torch.from_numpy(S * s.astype(np.float32) * levels.astype(np.float32))
    assert torch.equal(form.unpack(packed, n, k), expected)
    assert (expected[0, :32] == 0).all()
    assert np.abs(s * levels).max() <= (120 if bits < 8 else 127)
    assert ((expected - weight).square().mean() / weight.square().mean()) < ERRORS[bits]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "block_size"), [(960, 16), (960, 32), (48, 16)])
def test_both_layouts_hold_the_same_numbers(bits: int, k: int, block_size: int) -> None:
    weight = torch.randn(48, k, generator=torch.Generator().manual_seed(1))
    (packed,) = round_two_level(weight, Strips(bits), "", None)
    codes, scales = round_two_level(weight, Format(bits, block_size), "", None)
    assert torch.equal(Format(bits, block_size).dequantize(codes, scales), Strips(bits).unpack(packed, 48, k))


def test_rows_in_several_calls_are_rounded_as_in_one() -> None:
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2)).bfloat16()
    (whole,) = round_two_level(weight, Strips(4), "", None)
    parts = [round_two_level(weight[start : start + 16], Strips(4), "", None)[0] for start in range(0, 64, 16)]
    assert torch.equal(whole, torch.cat(parts))


def test_it_loses_less_than_rounding_to_nearest_in_blocks_of_64() -> None:
    """In squared error, at fewer bits a weight: 4.16 against 4.5."""
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(3))
    ours = Strips(4).unpack(round_two_level(weight, Strips(4), "", None)[0], 256, 4096)
    theirs = Format(4, 64).dequantize(*round_to_nearest(weight, Format(4, 64), "", None))
    assert (ours - weight).square().mean() < 0.9 * (theirs - weight).square().mean()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_weights_keep_their_precision(scale: float) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4)) * scale
    for bits in ERRORS:
        error = (Strips(bits).unpack(round_to_levels(weight, Strips(bits), "", None)[0], 16, 256) - weight) / scale
        assert error.square().mean() < ERRORS[bits]


@pytest.mark.parametrize("bits", [2, 3])
def test_levels_fit_at_least_as_well_as_any_integer_scale(bits: int) -> None:
    """Against all sixteen scales of each block, with the fit's own S."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(6)) * torch.rand(32, 1)
    (packed,) = round_to_levels(weight, Strips(bits), "", None)
    _, _, S = read(packed.numpy().tobytes(), bits, 32, 128)
    blocks, unit = weight.view(32, 4, 1, 32, 1), torch.from_numpy(S[:, ::32])[:, :, None, None, None]
    s = torch.arange(16)[None, None, :, None, None]
    grid = unit * s * torch.tensor({2: (-7, -2, 2, 7), 3: (-8, -5, -3, -1, 1, 3, 5, 8)}[bits])
    best = (blocks - grid).square().amin(dim=-1).sum(dim=-1).amin(dim=-1)  # [32, 4]
    found = (weight - Strips(bits).unpack(packed, 32, 128)).square().view(32, 4, 32).sum(dim=-1)
    assert found.sum() <= 1.01 * best.sum()
    assert (found >= 0.999 * best).all()


def test_zeros_stay_zeros() -> None:
    for bits in ERRORS:
        (packed,) = round_to_levels(torch.zeros(16, 96), Strips(bits), "", None)
        assert not Strips(bits).unpack(packed, 16, 96).any()


@pytest.mark.parametrize("inner", [96, 40])  # 40 rows do not fill their strips
def test_an_expert_is_one_piece_and_comes_apart_again(inner: int) -> None:
    generator = torch.Generator().manual_seed(5)
    gate, up, down = (torch.randn(*shape, generator=generator) for shape in ((inner, 192), (inner, 192), (192, inner)))
    forms = Strips(4), Strips(8)
    packed = [
        round_two_level(rows, form, "", None)[0] for rows, form in ((gate, forms[0]), (up, forms[0]), (down, forms[1]))
    ]
    expert = pack_expert(*packed)
    assert expert.numel() == expert_bytes(*forms, 192, inner)
    assert torch.equal(expert[: forms[0].strip_bytes(192)], packed[0][0])
    assert torch.equal(expert[forms[0].strip_bytes(192) :][: forms[0].strip_bytes(192)], packed[1][0])
    gate_up, back = unpack_expert(expert, *forms, 192, inner)
    assert torch.equal(gate_up, torch.cat([forms[0].unpack(part, inner, 192) for part in packed[:2]]))
    assert torch.equal(back, forms[1].unpack(packed[2], 192, inner))


def test_superblocks_divide_the_real_widths() -> None:
    sizes = {k: superblock_size(k) for k in (4096, 6400, 960, 448, 192, 96)}
    assert sizes == {4096: 512, 6400: 320, 960: 320, 448: 448, 192: 192, 96: 128}
