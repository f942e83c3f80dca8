"""GPTQ on the grid of two-level scales, against closed forms and round to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize import gptq
from phimoe_onnx.exporter.quantize.calibrated import loaded, round_calibrated, stored, words
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.gptq import GRIDS, Grid, Moments, Rounded, Rounder, Sums, corrected, fit_scales
from phimoe_onnx.exporter.quantize.strips import Strips

GRID2, GRID3 = Grid((-7, -2, 2, 7)), Grid((-8, -5, -3, -1, 1, 3, 5, 8))  # native/FORMAT.md
ALL = {"2 bits": GRID2, "3 bits": GRID3, "4 bits": GRIDS[4], "8 bits": GRIDS[8]}


def inputs(k: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """[tokens, k], of unequal and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -1.5, k)
    return torch.randn(tokens, k, generator=generator) @ mix


def matrix(n: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def error(weight: torch.Tensor, rounded: torch.Tensor, h: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    off = (weight - rounded).double()
    return float(((off @ h.double()) * off).sum())


def nearest(weight: torch.Tensor, h: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to nearest with the very scales that the sweep begins with."""
    s, S = fit_scales(weight, h.diagonal(), grid)
    unit = gptq._by_input(s, S, weight.shape[1])
    return grid.nearest(weight * gptq._inverse(unit)) * unit


@pytest.mark.parametrize("grid", ALL.values(), ids=ALL)
@pytest.mark.parametrize("k", [32, 96, 160])
def test_the_error_is_far_below_that_of_rounding_to_nearest(k: int, grid: Grid) -> None:
    x = inputs(k, 400)
    h, weight = x.T @ x / len(x), matrix(24, k)
    rounded, found, square = Rounder(h, grid).round(weight)
    q = rounded.dequantize()
    assert error(weight, q, h) < 0.6 * error(weight, nearest(weight, h, grid), h)
    damped = h / h.diagonal().mean() + gptq.DAMPING * torch.eye(k)
    assert found == pytest.approx(error(weight, q, damped), rel=1e-3)
    assert square == pytest.approx(error(weight, torch.zeros(1), damped), rel=1e-3)


def test_what_is_found_lies_on_the_grid() -> None:
    x = inputs(192, 300)
    for grid in ALL.values():
        rounded, *_ = Rounder(x.T @ x, grid).round(matrix(20, 192))
        assert set(rounded.levels.unique().tolist()) <= set(grid.levels)
        assert rounded.levels.shape == (20, 192)
        assert rounded.s.shape == (20, 6)
        assert rounded.S.shape == (20, 1)
        if grid.scaled:
            assert rounded.s.min() >= 1
            assert rounded.s.max() <= 15
        else:
            assert (rounded.s == 1).all()


def test_with_uncorrelated_inputs_the_sweep_is_rounding_to_nearest() -> None:
    """A diagonal H: no error can be made good by another input."""
    weight, h = matrix(16, 96), torch.diag(torch.linspace(0.1, 3, 96))
    rounder = Rounder(h, GRIDS[4])
    s, S = fit_scales(weight, rounder._damped.diagonal(), GRIDS[4])
    unit = gptq._by_input(s, S, 96)
    swept = rounder._sweep(weight.T.contiguous(), unit.T).T
    assert torch.equal(swept, GRIDS[4].nearest(weight * gptq._inverse(unit)))


def test_the_sweep_is_gptqs() -> None:
    """The same codes as the paper's algorithm, which divides by the Cholesky factor of the inverse and corrects what
    is left after each column.
    """
    k = 64
    x, weight = inputs(k, 300).double(), matrix(8, k).double()
    rounder = Rounder((x.T @ x).float(), GRIDS[4])
    s, S = fit_scales(weight.float(), rounder._damped.diagonal(), GRIDS[4])
    unit = gptq._by_input(s, S, k)
    order = torch.argsort(rounder._damped.diagonal(), descending=True, stable=True)
    h = rounder._damped.double()[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, codes = weight[:, order].clone(), torch.empty(8, k)
    for i in range(k):
        step = unit[:, order[i]].double()
        codes[:, order[i]] = GRIDS[4].nearest(left[:, i] / step).float()
        off = (left[:, i] - codes[:, order[i]] * step) / upper[i, i]
        left[:, i:] -= off[:, None] * upper[i, i:]
    assert torch.equal(rounder._sweep(weight.float().T.contiguous(), unit.T).T, codes)


def test_a_tiny_matrix_is_near_the_best_of_all_codes() -> None:
    """Brute force over the codes of four inputs, the others' weights being zero."""
    grid, k = Grid((-2, -1, 0, 1, 2)), 32
    x = inputs(k, 200)
    h = x.T @ x / len(x)
    weight = torch.zeros(6, k)
    weight[:, :4] = matrix(6, 4)
    rounded, *_ = Rounder(h, grid, damping=1e-6).round(weight)
    unit = gptq._by_input(rounded.s.float(), rounded.S.float(), k)[:, :1]
    codes = torch.tensor(list(itertools.product(grid.levels, repeat=4))).float()
    rest = rounded.dequantize()
    for row in range(6):
        tried = rest[row].repeat(len(codes), 1)
        tried[:, :4] = codes * unit[row]
        errors = (((weight[row] - tried) @ h) * (weight[row] - tried)).sum(1)
        own = error(weight[row : row + 1], rest[row : row + 1], h)
        assert own <= 1.35 * float(errors.min()), row


def test_no_step_after_the_sweep_makes_the_error_larger() -> None:
    x = inputs(160, 300)
    rounder, weight = Rounder(x.T @ x / len(x), GRIDS[4]), matrix(32, 160)
    s, S = fit_scales(weight, rounder._damped.diagonal(), GRIDS[4])
    columns = weight.T.contiguous()
    swept = rounder._sweep(columns, gptq._by_input(s, S, 160).T)
    work = gptq._Work(columns, swept, s.T.contiguous(), S.T.contiguous())
    errors, image = [], rounder._damped @ columns
    for step in (
        lambda: None,
        lambda: work.refit(rounder._damped, image),
        lambda: work.descend(rounder._damped, GRIDS[4]),
    ):
        step()
        off = work.residual()
        errors.append((off * (rounder._damped @ off)).sum(0))
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert (errors[2] <= errors[1] * 1.0001).all()
    assert errors[2].sum() < errors[1].sum() < errors[0].sum()


def test_each_input_keeps_its_blocks_scale_whatever_the_order_of_the_sweep() -> None:
    """The inputs in another order, each with its unit, get the same codes in that order."""
    x, weight = inputs(64, 300), matrix(32, 64)
    moved = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    one, other = Rounder(x.T @ x, GRIDS[4]), Rounder(x[:, moved].T @ x[:, moved], GRIDS[4])
    unit = gptq._by_input(*fit_scales(weight, torch.ones(64), GRIDS[4]), 64)
    codes = one._sweep(weight.T.contiguous(), unit.T)
    again = other._sweep(weight.T[moved], unit.T[moved])
    assert (codes[moved] != again).float().mean() < 0.01  # but for the order of sums


def test_tiny_huge_and_zero_rows() -> None:
    weight = matrix(4, 64) * torch.tensor([1e-30, 1e30, 1.0, 0.0])[:, None]
    x = inputs(64, 300)
    rounded, *_ = Rounder(x.T @ x, GRIDS[4]).round(weight)
    q = rounded.dequantize()
    outputs, off = (x.double() @ matrix.double().T for matrix in (weight, q - weight))
    assert (off.square().sum(0)[:3] < 0.01 * outputs.square().sum(0)[:3]).all()
    assert not q[3].any()


def test_inputs_that_never_occur_and_no_inputs_at_all() -> None:
    x, weight = inputs(64, 300), matrix(8, 64)
    x[:, 5] = 0
    for h in (x.T @ x, torch.zeros(64, 64), x[:1].T @ x[:1]):
        q = Rounder(h, GRIDS[4]).round(weight)[0].dequantize()
        assert (q - weight).abs().max() < 1.5


def test_what_is_given_stays_as_it_is() -> None:
    """All experts of a layer are given the same pooled moments."""
    x, weight = inputs(64, 300), matrix(8, 64)
    given = [x.T @ x / len(x), torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 100, weight]
    kept = [tensor.clone() for tensor in given]
    Rounder(given[0], GRIDS[4], given[1]).round(weight)
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))


def test_a_factor_is_damped_until_there_is_one() -> None:
    indefinite = torch.tensor([[1.0, 4.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    factor = gptq._factor(indefinite, 0.01, torch.tensor([2, 0, 1]))
    damped = torch.tensor([[11.0, 0.0, 0.0], [0.0, 11.0, 4.0], [0.0, 4.0, 11.0]])
    torch.testing.assert_close(factor @ factor.T, damped)
    assert torch.equal(factor, factor.tril())


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ExportError, match="numbers in this model that float32 cannot hold"):
        Rounder(torch.full((32, 32), torch.inf), GRIDS[4])


def test_a_matrix_in_slabs_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(64, 300), matrix(50, 64)
    whole, *_ = Rounder(x.T @ x, GRIDS[4]).round(weight)
    monkeypatch.setattr(gptq, "ROWS", 16)
    parts, *_ = Rounder(x.T @ x, GRIDS[4]).round(weight)
    assert torch.equal(whole.levels, parts.levels)
    assert torch.equal(whole.S, parts.S)


def test_corrected_weights_reproduce_the_float_outputs() -> None:
    """Where the float inputs y are a linear map of the quantised x, W' x = W y exactly."""
    x, weight = inputs(24, 200).double(), matrix(6, 24).double()
    y = x @ (torch.eye(24).double() + 0.1 * matrix(24, 24, seed=5).double())
    sums = Sums(24)
    sums.add(x.float(), y.float())
    mended = corrected(weight.float(), sums.moments(), damping=1e-7).double()
    before, after = (x @ w.T - y @ weight.T for w in (weight, mended))
    assert after.square().mean() < 1e-5 * before.square().mean()


def test_the_correction_is_the_same_for_few_rows_and_for_many() -> None:
    """Once for the matrix of inputs where there are more rows than these, else row by row."""
    x = inputs(64, 300)
    drift, weight = matrix(64, 64, seed=3) / 10, matrix(64, 64)
    h = x.T @ x / len(x)
    many = Rounder(h, GRIDS[8], drift).round(weight)[0].dequantize()
    few = Rounder(h, GRIDS[8], drift).round(weight[:20])[0].dequantize()
    plain = Rounder(h, GRIDS[8]).round(weight)[0].dequantize()
    torch.testing.assert_close(many[:20], few, rtol=0, atol=0.01)
    expected = corrected(weight, Moments(h, drift, 1, 1))
    assert (many - expected).norm() < 0.1 * (plain - expected).norm()


@pytest.mark.parametrize("stripe", [512, 3])
def test_moments_are_weighted_means(stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "STRIPE", stripe)
    x, y, weight = inputs(8, 30), inputs(8, 30, seed=7), torch.rand(30)
    sums = Sums(8)
    for span in (slice(0, 11), slice(11, 30)):
        sums.add(x[span], y[span], weight[span])
    moments = sums.moments()
    p = weight / weight.sum()
    torch.testing.assert_close(moments.inputs, torch.einsum("t,ti,tj->ij", p, x, x))
    torch.testing.assert_close(moments.drift, torch.einsum("t,ti,tj->ij", p, y - x, x))
    assert moments.tokens == pytest.approx(1 / float(p.square().sum()), rel=1e-4)


def expert_moments(tokens: int, seed: int) -> tuple[Moments, Moments, torch.Tensor]:
    """Of an expert whose inputs differ from all others' somewhat: from few tokens, of all, and its own exact H."""
    k = 48
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(k, k, generator=generator) * torch.logspace(0, -1, k)
    own = base + 0.25 * torch.randn(k, k, generator=generator) * torch.logspace(0, -1, k)
    sums, others = Sums(k), Sums(k)
    x = torch.randn(tokens, k, generator=generator) @ own
    sums.add(x, x)
    x = torch.randn(4000, k, generator=generator) @ base
    others.add(x, x)
    return sums.moments(), others.moments(), own.T @ own


def test_with_fewer_tokens_than_inputs_shrinking_is_better_than_none() -> None:
    """Better on the expert's own inputs than with its few tokens alone, and nearer to its true moments."""
    alone, mixed = 0.0, 0.0
    for seed in range(6):
        few, pooled, exact = expert_moments(20, seed)
        shrunk, rho = few.shrunk(pooled)
        assert 0.1 < rho <= 1
        near, far = (float((m.inputs - exact).square().sum()) for m in (shrunk, few))
        assert near < far
        weight = matrix(16, 48, seed)
        q, r = (Rounder(m.inputs, GRIDS[4]).round(weight)[0].dequantize() for m in (few, shrunk))
        alone += error(weight, q, exact)
        mixed += error(weight, r, exact)
    assert mixed < 0.8 * alone


def test_shrinkage_vanishes_with_many_tokens_and_is_whole_without_any() -> None:
    few, pooled, _ = expert_moments(20, 0)
    many = expert_moments(20000, 0)[0]
    assert many.shrunk(pooled)[1] < 0.05 < few.shrunk(pooled)[1]
    for tokens in (0, 1):
        shrunk, rho = expert_moments(tokens, 0)[0].shrunk(pooled)
        assert rho == 1
        assert torch.equal(shrunk.inputs, pooled.inputs)


def test_shrinkage_is_the_best_mixture_on_average() -> None:
    """Against the mixture that is best in hindsight, over many draws of the few tokens."""
    k, tokens = 12, 10
    generator = torch.Generator().manual_seed(0)
    base, own = (torch.randn(k, k, generator=generator) for _ in range(2))
    target = Moments(base.T @ base, torch.zeros(k, k), 1e9, 0)
    exact, found, losses = own.T @ own, 0.0, torch.zeros(21)
    mixtures = torch.linspace(0, 1, 21)
    for _ in range(200):
        sums, x = Sums(k), torch.randn(tokens, k, generator=generator) @ own
        sums.add(x, x)
        few = sums.moments()
        found += float((few.shrunk(target)[0].inputs - exact).square().sum())
        losses += torch.stack([(torch.lerp(few.inputs, target.inputs, m) - exact).square().sum() for m in mixtures])
    assert found < 1.1 * float(losses.min())
    assert found < 0.9 * float(losses[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [96, 192])
def test_both_layouts_hold_what_was_found(bits: int, k: int) -> None:
    x = inputs(k, 300)
    rounded, *_ = Rounder(x.T @ x, GRIDS[bits]).round(matrix(32, k))
    again = loaded(stored(rounded, bits), k)
    assert all(torch.equal(getattr(again, part), getattr(rounded, part)) for part in ("levels", "s", "S"))
    (strips,) = round_calibrated(words(rounded), Strips(bits), "", None)
    codes, scales = round_calibrated(words(rounded), Format(bits, 32), "", None)
    assert torch.equal(Strips(bits).unpack(strips, 32, k), rounded.dequantize())
    assert torch.equal(Format(bits, 32).dequantize(codes, scales), rounded.dequantize())


def test_words_keep_negative_numbers() -> None:
    rounded = Rounded(
        torch.tensor([[-127, 127] * 32], dtype=torch.int8),
        torch.ones(1, 2, dtype=torch.uint8),
        torch.tensor([[-1.5]], dtype=torch.bfloat16),
    )
    (strips,) = round_calibrated(words(rounded), Strips(8), "", None)
    assert torch.equal(Strips(8).unpack(strips, 1, 64), torch.tensor([[190.5, -190.5] * 32]))


def test_the_sign_of_a_superblock_gives_the_larger_side_the_level_beyond() -> None:
    """Levels reach from -8 to 7: weights from -7 to 8 are exact with a negative S."""
    weight = torch.tensor([[8.0, -7.0, 3.0, 1.0] * 16, [-8.0, 7.0, 3.0, 1.0] * 16])
    s, S = fit_scales(weight, torch.ones(64), GRIDS[4])
    assert (S[0] < 0).all()
    assert (S[1] > 0).all()
    unit = gptq._by_input(s, S, 64)
    torch.testing.assert_close(GRIDS[4].nearest(weight / unit) * unit, weight, rtol=2**-8, atol=0)  # S is a bfloat16


def test_scales_count_by_the_importance_of_inputs() -> None:
    weight, importance = matrix(64, 64), torch.logspace(0, -3, 64)
    errors = []
    for found in (fit_scales(weight, importance, GRIDS[4]), fit_scales(weight, torch.ones(64), GRIDS[4])):
        unit = gptq._by_input(*found, 64)
        off = weight - GRIDS[4].nearest(weight * gptq._inverse(unit)) * unit
        errors.append(float((off.square() * importance).sum()))
    assert errors[0] < 0.95 * errors[1]
