"""GPTQ (arXiv 2210.17323) on the grid of two-level scales: the mathematics of one matrix.

A weight is S * s * level: S a bfloat16 for each superblock of a row, s an integer for each block of 32, level one of a
few integers (strips.py). All here looks for the Q on that grid whose outputs are nearest: the least tr((W - Q) H
(W - Q)^T), where H is the mean of x x^T over the inputs x that the matrix is given. Rows of W are independent of each
other, so they are taken slab by slab.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize.strips import BLOCK, LEVELS, TILE, superblock_size

DAMPING = 0.01  # of H's mean diagonal, added to its diagonal: what is not known of inputs that hardly occur
TARGET_DAMPING = 0.05
LARGEST_SCALE = 15
SHARES = (0.6, 0.68, 0.76, 0.84, 0.92, 1.0)  # tried for a block's scale, of the one that clips nothing
SWEEPS = 1  # of coordinate descent
LARGEST_SCALES = (15.0, 16.3, 14.0, 13.0)  # tried for the largest s of a superblock
ROWS = 4096  # of a slab
COLUMNS = 64  # that are rounded before what comes behind them is brought up to date
STRIPE = 512  # rows of a symmetric matrix of sums, of which only what is right of the diagonal is added up
SAMPLE = 64  # rows of a slab of which the error is told
CACHED = 1 << 18  # weights whose scales are found at once: what lies between stays in the processor's cache


@dataclass(frozen=True)
class Grid:
    """The numbers that a code may stand for.

    Attributes:
        levels: int, ascending, at most 256 of them.
        scaled: whether each block of 32 has an s of its own, from 1 to 15 (0 where its weights are all 0); else s is 1.
    """

    levels: tuple[int, ...]
    scaled: bool = True

    def nearest(self, x: Tensor) -> Tensor:
        """The level nearest to each number, in the dtype of x."""
        low, high = self.levels[0], self.levels[-1]
        if len(self.levels) == high - low + 1:
            return x.round().clamp_(low, high)
        known = torch.tensor(self.levels, dtype=x.dtype)
        return known[torch.bucketize(x.contiguous(), (known[1:] + known[:-1]) / 2)]


GRIDS = {  # by bits
    **{bits: Grid(levels) for bits, levels in LEVELS.items()},
    4: Grid(tuple(range(-8, 8))),
    8: Grid(tuple(range(-127, 128)), scaled=False),
}


@dataclass(frozen=True)
class Rounded:
    """A matrix [N, K] on a grid.

    Attributes:
        levels: int8 [N, K].
        s: uint8 [N, K / 32, rounded up].
        S: bfloat16 [N, superblocks].
    """

    levels: Tensor
    s: Tensor
    S: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        n, k = self.levels.shape
        weight = torch.empty(n, k)
        for start in range(0, n, ROWS):  # what lies between a slab's parts and its weights is as large as these
            span = slice(start, start + ROWS)
            weight[span] = self.levels[span] * _by_input(self.s[span].float(), self.S[span].float(), k)
        return weight


@dataclass(frozen=True)
class Moments:
    """What is known of a matrix's inputs: x of the quantised model, y of the float one at the same tokens.

    Attributes:
        inputs: the weighted mean of x x^T, float32 [K, K].
        drift: the weighted mean of (y - x) x^T.
        tokens: how many equally weighted tokens would say as much, (sum w)^2 / sum w^2 (Kish's effective size).
        fourth: the sum of p^2 |x|^4, where p are the weights by their sum.
        share: of the weight of all tokens over which the pooled moments are taken.
    """

    inputs: Tensor
    drift: Tensor
    tokens: float
    fourth: float
    share: float = 0.0

    def shrunk(self, pooled: Moments) -> tuple[Moments, float]:
        """Pulled towards the pooled moments as far as few tokens make it worth while, and how far: rho from 0 to 1.

        H = (1 - rho) H_e + rho H_p has the least expected squared distance (Frobenius) from the H_e of infinitely many
        tokens at rho = (V - cov) / D, where V is the variance of H_e's estimate, summed over its elements, D the
        expected squared distance of H_e and H_p, and cov is between the two: Ledoit and Wolf 2004, for a target with
        noise in common Schaefer and Strimmer 2005, equation 8. V is estimated as (sum p^2 |x|^4 - sum p^2 |H_e|^2) /
        (1 - sum p^2), which for equal weights is unbiased; H_p has the expert's own tokens in it with their share, so
        cov = share V; D is what is found. The drift is mixed alike: the expert is fitted as if it had seen the other
        tokens, too, each with that weight.
        """
        rho = 1.0
        if self.tokens > 1.5:
            own, distance = float(self.inputs.square().sum()), float((self.inputs - pooled.inputs).square_().sum())
            variance = max(0.0, self.fourth - own / self.tokens) / (1 - 1 / self.tokens)
            rho = min(1.0, variance * (1 - self.share) / distance) if distance > 0 else 0.0
        if rho == 1.0:
            return replace(self, inputs=pooled.inputs, drift=pooled.drift), rho
        mixed = (
            torch.lerp(one, other, rho) for one, other in ((self.inputs, pooled.inputs), (self.drift, pooled.drift))
        )
        inputs, drift = mixed
        return replace(self, inputs=inputs, drift=drift), rho


class Sums:
    """Adds up `Moments`, chunk by chunk in the order of the calls.

    Args:
        k: the number of inputs.
    """

    def __init__(self, k: int) -> None:
        self._inputs, self._drift = torch.zeros(k, k), torch.zeros(k, k)
        self._weight = self._square = self._fourth = 0.0

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Adds tokens: inputs of the quantised and of the float model, float32 [T, K], and a weight [T] for each."""
        weighted = x if weight is None else x * weight[:, None]
        for stripe in self._stripes():
            self._inputs[stripe, stripe.start :].addmm_(weighted[:, stripe].T, x[:, stripe.start :])
        self._drift.addmm_((y - x).T, weighted)
        double = torch.ones(len(x), dtype=torch.float64) if weight is None else weight.double()
        self._weight += float(double.sum())
        self._square += float(double.square().sum())
        self._fourth += float((double * torch.linalg.vecdot(x, x)).square().sum())

    def _stripes(self) -> list[slice]:
        k = len(self._inputs)
        return [slice(start, min(start + STRIPE, k)) for start in range(0, k, STRIPE)]

    @property
    def weight(self) -> float:
        """Of all tokens so far."""
        return self._weight

    def moments(self, share: float = 0.0) -> Moments:
        """What was added, as means, which take the sums' place: this ends them. `share` is that of `Moments`."""
        for stripe in self._stripes():
            self._inputs[stripe.stop :, stripe] = self._inputs[stripe, stripe.stop :].T
        weight = self._weight or 1.0
        tokens = self._weight**2 / self._square if self._square else 0.0
        return Moments(self._inputs.div_(weight), self._drift.div_(weight), tokens, self._fourth / weight**2, share)


def corrected(weight: Tensor, moments: Moments, damping: float = TARGET_DAMPING) -> Tensor:
    """The weights [N, K] that make of the quantised model's inputs what `weight` makes of the float model's.

    W' = W + W D (H + damping)^-1 with D the drift's matrix: the least squares of W' x - W y over the tokens, held
    towards W by the damping.
    """
    return weight + _divided(weight @ moments.drift, _factor(moments.inputs, damping))


def _divided(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows times the inverse of the matrix with this Cholesky factor."""
    return torch.cholesky_solve(rows.T, factor).T


def _factor(inputs: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """The Cholesky factor of the damped matrix, of its rows and columns in that order; damped more where float32 asks
    for it.

    Raises:
        ExportError: the matrix holds numbers that are not finite.
    """
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(inputs)):
        raise ExportError(
            "--calibrate: the text makes numbers in this model that float32 cannot hold; give another text, or leave "
            "--calibrate out"
        )
    # transposed, which is how LAPACK wants it, so that the factor takes the matrix's place
    factor, failed = torch.empty(inputs.shape).T, torch.empty((), dtype=torch.int32)
    while True:
        if order is None:
            factor.copy_(inputs)
        else:
            torch.index_select(inputs[order], 1, order, out=factor.T)
        factor.diagonal().add_(damping * factor.diagonal().mean().clamp_min(1e-30))
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            return factor
        damping *= 10


class Rounder:
    """Rounds matrices that are given the same inputs.

    Args:
        inputs: the mean of x x^T, float32 [K, K]; all zeros count as the identity.
        grid: what it rounds to.
        drift: that of `Moments`, for which a matrix is corrected first; None for none.
        damping: of the inputs' mean diagonal.
    """

    def __init__(self, inputs: Tensor, grid: Grid, drift: Tensor | None = None, damping: float = DAMPING) -> None:
        self.grid, self._drift = grid, drift
        self._target = None if drift is None else _factor(inputs, TARGET_DAMPING)
        self._mend: Tensor | None = None  # D (H + damping)^-1
        mean = float(inputs.diagonal().mean())
        inputs = inputs / mean if mean > 0 else torch.eye(len(inputs))
        # Inputs that say most come first: their errors are made good by all the others (act-order). The scales are
        # found before, each input keeps its own block's (static groups), so codes stay in their places.
        self._order = torch.argsort(inputs.diagonal(), descending=True, stable=True)
        upper = _factor(inputs, damping, self._order.flip(0)).flip(0, 1)  # H = R R^T, R upper triangular
        self._ratios = upper.contiguous().div_(upper.diagonal().clone())
        self._damped = inputs
        self._damped.diagonal().add_(damping)

    def round(self, weight: Tensor) -> tuple[Rounded, float, float]:
        """The matrix, float32 [N, K], on the grid, and the squared error of its outputs and the outputs' square, both
        in units of H's mean diagonal and of a sample of `SAMPLE` rows in each slab, spread over it.
        """
        if self._target is not None and self._drift is not None and len(weight) >= weight.shape[1]:
            # once for all rows is less work than for each
            self._mend, self._drift, self._target = _divided(self._drift, self._target), None, None
        slabs = [self._slab(weight[start : start + ROWS]) for start in range(0, len(weight), ROWS)]
        parts = (torch.cat([getattr(slab, part) for slab, _, _ in slabs]) for part in ("levels", "s", "S"))
        return Rounded(*parts), sum(error for _, error, _ in slabs), sum(square for _, _, square in slabs)

    def _slab(self, weight: Tensor) -> tuple[Rounded, float, float]:
        if self._mend is not None:
            weight = torch.addmm(weight, weight, self._mend)
        elif self._drift is not None and self._target is not None:
            weight = weight + _divided(weight @ self._drift, self._target)
        power = torch.frexp(weight.abs().amax(dim=1)).exponent  # squares of tiny or huge weights are no float32
        weight = torch.ldexp(weight, -power[:, None])
        s, S = fit_scales(weight, self._damped.diagonal(), self.grid)
        columns = weight.T.contiguous()
        del weight
        s, S = s.T.contiguous(), S.T.contiguous()
        work = _Work(columns, self._sweep(columns, _by_input(s, S, len(columns), dim=0)), s, S)
        image = self._damped @ columns
        work.refit(self._damped, image)
        for _ in range(SWEEPS):
            work.descend(self._damped, self.grid)
            work.refit(self._damped, image)
        del image
        sample = slice(0, None, max(1, len(power) // SAMPLE))
        error, square = (
            float((self._damped @ off).mul_(off).sum(0).double() @ torch.exp2(2 * power[sample].double()))
            for off in (work.residual()[:, sample], columns[:, sample])
        )
        S = torch.ldexp(work.S.T, power[:, None]).bfloat16()
        rounded = Rounded(work.levels.T.to(torch.int8).contiguous(), work.s.T.to(torch.uint8).contiguous(), S)
        return rounded, error, square

    def _sweep(self, columns: Tensor, units: Tensor) -> Tensor:
        """The levels, float32 [K, N], of weights and units [K, N]: one input after the other, each with what the
        earlier ones' errors do to the outputs made good.

        With H = R R^T, R upper triangular, the error is the square of (W - Q) R, and its column j is R_jj times (w_j +
        sum over i < j of (w_i - q_i) R_ij / R_jj - q_j): so q_j is the nearest to that. It is GPTQ's sweep in the form
        of QuIP's (arXiv 2307.13304, theorem 6), which needs no inverse.
        """
        order, ratios = self._order, self._ratios
        left, levels = columns[order], torch.empty_like(columns)  # weights, and once they are rounded their errors
        for start in range(0, len(left), COLUMNS):
            span = slice(start, min(start + COLUMNS, len(left)))
            wanted = left[span] + ratios[:start, span].T @ left[:start]
            for j, place in zip(range(span.start, span.stop), order[span].tolist(), strict=True):
                near = torch.addmv(wanted[j - start], left[start:j].T, ratios[start:j, j])
                levels[place] = self.grid.nearest(near * _inverse(units[place]))
                left[j].addcmul_(levels[place], units[place], value=-1)
        return levels


@dataclass
class _Work:
    """A slab while its scales and levels are made better, inputs first: weights and levels [K, N], s [blocks, N], S
    [superblocks, N], all float32. No step makes the error larger.
    """

    weights: Tensor
    levels: Tensor
    s: Tensor
    S: Tensor

    def residual(self) -> Tensor:
        """W - Q."""
        rounded = _by_input(self.s, self.S, len(self.weights), dim=0).mul_(self.levels)
        return torch.sub(self.weights, rounded, out=rounded)

    def refit(self, inputs: Tensor, image: Tensor) -> None:
        """All S of a row at once, by least squares under H, rounded to bfloat16; `image` is H W."""
        k, size = len(self.weights), superblock_size(len(self.weights))
        spans = [slice(start, min(start + size, k)) for start in range(0, k, size)]
        scaled = self.s.repeat_interleave(BLOCK, dim=0)[:k].mul_(self.levels)
        aim = torch.stack([(scaled[span] * image[span]).sum(0) for span in spans], dim=-1)
        curvature = torch.empty(scaled.shape[1], len(spans), len(spans))
        for column, span in enumerate(spans):
            product = inputs[: span.stop, span] @ scaled[span]
            for row, other in enumerate(spans[: column + 1]):
                curvature[:, row, column] = curvature[:, column, row] = (scaled[other] * product[other]).sum(0)
        slope = aim - (curvature @ self.S.T[..., None])[..., 0]
        mean = curvature.diagonal(dim1=1, dim2=2).mean(-1)
        steadied = curvature + torch.eye(len(spans)) * (1e-6 * mean + 1e-20)[:, None, None]
        wanted = self.S.T + torch.linalg.solve(steadied, slope)
        step = wanted.bfloat16().float() - self.S.T
        gain = 2 * (step * slope).sum(-1) - torch.einsum("ni,nij,nj->n", step, curvature, step)
        better = (gain > 0) & (wanted * self.S.T > 0).all(-1)
        self.S = torch.where(better, self.S + step.T, self.S)

    def descend(self, inputs: Tensor, grid: Grid) -> None:
        """Block by block, under what the others are: s, and then each code (QuantEase, arXiv 2309.01885)."""
        k, size = len(self.weights), superblock_size(len(self.weights))
        residual = self.residual()
        for block, start in enumerate(range(0, k, BLOCK)):
            span = slice(start, min(start + BLOCK, k))
            gradient, inner, levels = inputs[span] @ residual, inputs[span, span], self.levels[span]
            S = self.S[start // size]
            if grid.scaled:
                product = inner @ levels
                slope, curvature = (levels * gradient).sum(0), (levels * product).sum(0)
                moved = (self.s[block] + slope * _inverse(S * curvature)).round().clamp_(1, LARGEST_SCALE)
                moved = torch.where(self.s[block] > 0, moved, self.s[block])
                step = (moved - self.s[block]) * S
                residual[span] -= levels * step
                gradient -= product * step
                self.s[block] = moved
            unit = self.s[block] * S
            inverse = _inverse(unit)
            for i in range(len(levels)):
                near = grid.nearest(torch.addcmul(levels[i], gradient[i], inverse, value=1 / float(inner[i, i])))
                step = (near - levels[i]) * unit
                levels[i] = near
                residual[start + i] -= step
                gradient.addr_(inner[:, i], step, alpha=-1)


def fit_scales(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """s, float32 [N, blocks], and S, float32 [N, superblocks] that bfloat16 holds, by least squares of the weights'
    errors, each input's by its importance [K].

    Where levels reach further to one side, S has the sign with which the superblock's error is less. Without s, S clips
    nothing.
    """
    rows = max(1, CACHED // weight.shape[1])
    s, S = zip(*(_fit_rows(part, importance, grid) for part in weight.split(rows)), strict=True)
    return torch.cat(s), torch.cat(S)


def _fit_rows(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    size, rest = superblock_size(k), -k % TILE
    weights = pad(weight, (0, rest)).view(n, -1, size // BLOCK, BLOCK)
    blocks = -(-k // BLOCK)
    if not grid.scaled:
        return torch.ones(n, blocks), (_whole(weights, grid).amax(dim=-1) * (1 + 2**-8)).bfloat16().float()
    important = pad(importance, (0, rest)).view(-1, size // BLOCK, BLOCK)
    s, S, error = _fit(weights, important, grid)
    if grid.levels[0] != -grid.levels[-1]:
        others, Z, less = _fit(-weights, important, grid)
        better = less < error
        s, S = torch.where(better[..., None], others, s), torch.where(better, -Z, S)
    product, square = _sums(
        weights * important, important, grid.nearest(weights * _inverse(s * S[..., None])[..., None])
    )
    S = ((product * s).sum(-1) * _inverse((square * s * s).sum(-1))).bfloat16().float()
    return s.flatten(1)[:, :blocks].contiguous(), S


def _fit(weights: Tensor, important: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """s [N, superblocks, blocks], S > 0 [N, superblocks] and its weighted error, less the weights' own square, of
    weights [N, superblocks, blocks, 32].

    1. Each block by itself: of a few scales the one with the least error after its own refit.
    2. S takes the largest of them to some number up to 15 or a little beyond: of a few the one with the least error.
    3. s is the best of three neighbours.
    """
    weighted = weights * important
    whole = _whole(weights, grid)
    best, scale = torch.full_like(whole, -1.0), torch.zeros_like(whole)
    for share in SHARES:
        levels = grid.nearest(weights * _inverse(whole * share)[..., None])
        product, square = _sums(weighted, important, levels)
        gain = product.square() * _inverse(square)  # by how much the block's squared error falls
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, product * _inverse(square), scale)

    def errors(s: Tensor, S: Tensor) -> Tensor:
        unit = s * S[..., None]
        product, square = _sums(weighted, important, grid.nearest(weights * _inverse(unit)[..., None]))
        return unit * (unit * square - 2 * product)

    def near(S: Tensor, step: int = 0) -> Tensor:
        return ((scale * _inverse(S)[..., None]).round() + step).clamp(1, LARGEST_SCALE)

    tried = [(scale.amax(dim=-1) / largest).bfloat16().float() for largest in LARGEST_SCALES]
    S = tried[0]
    least = errors(near(S), S).sum(-1)
    for other in tried[1:]:
        error = errors(near(other), other).sum(-1)
        better = error < least
        least, S = torch.where(better, error, least), torch.where(better, other, S)
    s, block = near(S), errors(near(S), S)
    for step in (-1, 1):
        moved = near(S, step)
        error = errors(moved, S)
        better = error < block
        block, s = torch.where(better, error, block), torch.where(better, moved, s)
    return torch.where(whole > 0, s, 0.0), S, block.sum(-1)


def _whole(weights: Tensor, grid: Grid) -> Tensor:
    """The unit of blocks [..., 32] that clips nothing."""
    return torch.maximum(weights.amin(dim=-1) / grid.levels[0], weights.amax(dim=-1) / grid.levels[-1])


def _sums(weighted: Tensor, importance: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """<d w, q> and <d q, q> of blocks [..., 32]."""
    return torch.linalg.vecdot(weighted, levels), torch.linalg.vecdot(levels * importance, levels)


def _by_input(s: Tensor, S: Tensor, k: int, dim: int = 1) -> Tensor:
    """S * s of each input: [N, K] of s [N, blocks] and S [N, superblocks]; with dim 0 all three transposed."""
    outer = S.repeat_interleave(superblock_size(k) // BLOCK, dim=dim).narrow(dim, 0, s.shape[dim])
    return (outer * s).repeat_interleave(BLOCK, dim=dim).narrow(dim, 0, k)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)
