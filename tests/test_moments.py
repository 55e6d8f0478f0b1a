"""Second moments and least squares against double precision and numpy, few vectors and many."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depcut
from depcut.calibration.folds import Folds
from depcut.calibration.held_out import ridges_of
from depcut.calibration.inputs import Inputs
from depcut.calibration.moments import Moments, Vectors
from depcut.calibration.products import Runs
from depcut.calibration.solve import RIDGES
from depcut.calibration.visits import visits
from depcut.repair.norms import _Spread
from depcut.scores import Score
from depcut.scores.context import Context
from depcut.scores.elimination import Weight, eliminated
from depcut.scores.quadratic import FullGram, FullInverse, ThinGram, ThinInverse
from depcut.scores.reconstruction import _Elimination
from depcut.support.processes import ALONE


def hard(blocks: int, vectors: int, size: int) -> Tensor:
    """Columns of very unlike means and scales, some constant, some zero."""
    x = torch.randn(blocks, vectors, size, generator=torch.Generator().manual_seed(vectors))
    x[..., 1] = x[..., 1].relu() * 1e4  # massive
    x[..., 2] = 1000.1  # constant
    x[..., 3] = 0.0  # dead
    x[..., 4] = 100 + 1e-2 * x[..., 4]  # a large mean
    x[..., 5] *= 1e-12  # a tiny variance
    x[..., 6] = x[..., 0] + 1e-3 * x[..., 6]
    x[:, : vectors // 2, 7] += 50  # a mean that moves
    return x


@pytest.mark.parametrize(("blocks", "vectors", "size"), [(1, 5000, 300), (3, 2500, 9), (2, 7, 12)])
def test_single_precision_keeps_seven_digits_of_every_product(
    blocks: int, vectors: int, size: int
) -> None:
    x, y = hard(blocks, vectors, size), hard(blocks, vectors, 8).flip(-1)
    assert_products(Runs(x).gram(), x, x)
    assert_products(Runs(y).cross(Runs(x)), y, x)
    torch.testing.assert_close(Runs(x).total(), x.double().sum(1), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(Runs(x).squares(), x.double().square().sum(1), rtol=1e-6, atol=0)


def assert_products(found: Tensor, a: Tensor, b: Tensor) -> None:
    """Covariances are right to their own scale, not to that of the means."""
    a, b = a.double(), b.double()
    means = [v.mean(1, keepdim=True) for v in (a, b)]
    cross = a.shape[1] * means[0].transpose(1, 2) @ means[1]
    sums = [Runs(v.float()).total() for v in (a, b)]
    less = sums[0][:, :, None] * sums[1][:, None, :] / a.shape[1]
    centred = (a - means[0]).transpose(1, 2) @ (b - means[1])
    # A mean is rounded to single precision, which leaves of a constant that much.
    norms = [(v - m).norm(dim=1) + 1e-6 * v.norm(dim=1) for v, m in zip((a, b), means, strict=True)]
    # What double precision itself leaves of a covariance beside the product of the means.
    rounding = 1e-13 * cross.abs() + 1e-30
    # Within a run, products of deviations are rounded; between runs nothing is.
    bound = 2e-6 * norms[0][:, :, None] * norms[1][:, None, :] + rounding
    assert bool(((found - less - centred).abs() <= bound).all())
    plain = a.norm(dim=1)[:, :, None] * b.norm(dim=1)[:, None, :]
    assert bool(((found - a.transpose(1, 2) @ b).abs() <= 1e-6 * plain).all())


def test_lowered_precision_of_products_is_not_used() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert Runs(torch.ones(1, 3, 2)).runs[0].dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)


def test_statistics_of_a_large_mean_that_moves() -> None:
    values = [1e4 + i + 1e-1 * torch.randn(4, 3, 5, 5) for i in range(3)]
    first, *others = map(_Spread.of, values)
    found = sum(others, first)
    mean, variance = found.mean, found.variance
    whole = torch.cat(values).double()
    torch.testing.assert_close(mean, whole.mean((0, 2, 3)), rtol=1e-9, atol=0)
    expected = whole.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(variance, expected, rtol=1e-5, atol=0)


# Least squares -----------------------------------------------------------------------------------


def by_numpy(x: Tensor, y: Tensor, start: Tensor, ridge: float, free: bool) -> Tensor:
    """W by rows that pull it towards where it was, one block."""
    spread = x - x.mean(0) if free else x
    target = (y - y.mean(0) if free else y) - spread @ start.T
    pull = (ridge * spread.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
    left = torch.cat([spread, pull]).numpy()
    right = torch.cat([target, torch.zeros(x.shape[1], y.shape[1]).double()]).numpy()
    return start + torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0].T)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("vectors", [3, 11, 12, 60])
@pytest.mark.parametrize("deficient", [False, True])
def test_vectors_and_moments_solve_as_numpy_does(
    free: bool, ridge: float, vectors: int, deficient: bool
) -> None:
    torch.manual_seed(vectors)
    x, y = torch.randn(2, vectors, 12).double() + 3, torch.randn(2, vectors, 5).double()
    if deficient:
        x[..., 4], x[..., 5], x[..., 6] = x[..., 3], 0, 2.5
    start = torch.randn(2, 5, 12).double()
    for fold in (Vectors(x, y), Moments.of(x, y)):
        found = fold.fitted(start, ridge, free)
        expected = torch.stack([by_numpy(*b, ridge, free) for b in zip(x, y, start, strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        bias = torch.randn(2, 5).double()
        error = (y - x @ found.transpose(1, 2) - bias[:, None]).square().sum(1)
        torch.testing.assert_close(fold.error(found, bias), error, rtol=1e-6, atol=1e-8)
        # Another start is another problem.
        other = fold.fitted(torch.zeros_like(start), ridge, free)
        nothing = torch.zeros(5, 12).double()
        expected = torch.stack([by_numpy(*b, nothing, ridge, free) for b in zip(x, y, strict=True)])
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("kind", "size", "near"), [(0, 300, 1e-9), (1, 12, 1e-9), (1, 300, 1e-4)])
def test_what_a_fold_misses_of_the_other_is_that_of_its_own_fit(
    free: bool, kind: int, size: int, near: float
) -> None:
    torch.manual_seed(size)
    xs = [torch.randn(1, n, size).double() @ torch.randn(size, size).double() for n in (90, 120)]
    xs = [x * torch.logspace(-3, 3, size) + 5 * torch.randn(size).double() for x in xs]
    ys = [x[..., :4] + torch.randn(1, x.shape[1], 4).double() for x in xs]
    folds = [(Vectors, Moments.of)[kind](x, y) for x, y in zip(xs, ys, strict=True)]
    start = torch.randn(1, 4, size).double()
    ridges = ridges_of(folds, start, free)
    at_start = sum(float(f.error(start, torch.ones(1, 4).double()).sum()) for f in folds)
    assert ridges.given(torch.ones(1, 4).double()) == pytest.approx(at_start, rel=1e-9)
    for ridge in RIDGES[:-1]:
        expected = 0.0
        for fit, test in (folds, folds[::-1]):
            w = fit.fitted(start, ridge, free)
            bias = (fit.y - (w @ fit.x[:, :, None])[..., 0]) / fit.count * free
            expected += float(test.error(w, bias).sum())
        assert ridges.missed(ridge) == pytest.approx(expected, rel=near)
    whole = (folds[0] + folds[1]).fitted(start, 1e-2, free)
    torch.testing.assert_close(ridges.fitted(1e-2), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("counts", [[4], [4, 5], [4, 5, 2], [20, 3], [40]])
def test_folds_hold_every_vector_once_and_few_ones_as_they_are(counts: list[int]) -> None:
    parts = [(i, torch.randn(1, n, 12), torch.randn(1, n, 3)) for i, n in enumerate(counts)]
    seen = Folds(len(parts))
    for part in parts:
        seen.add(*part)
    folds = seen.moments("", ALONE)
    assert all(isinstance(f, Vectors if sum(counts) < 12 else Moments) for f in folds)
    assert len(folds) == 2
    for place, fold in enumerate(folds):
        mine = [part[1:] for part in parts if part[0] % 2 == place]
        if len(counts) == 1:
            mine = [tuple(t.chunk(2, 1)[place] for t in parts[0][1:])]
        x, y = (torch.cat([m[i] for m in mine], 1).double() for i in (0, 1))
        assert fold.count == x.shape[1]
        torch.testing.assert_close(fold.x, x.sum(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fold.yy, y.square().sum(1), rtol=1e-5, atol=1e-5)


# Scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [1, 3])
@pytest.mark.parametrize("blockwise", [False, True])
def test_few_vectors_and_few_outputs_are_eliminated_as_full_matrices_are(
    wide: int, blockwise: bool
) -> None:
    torch.manual_seed(0)
    units, blocks = 20, 2
    size = units * wide + 2  # two columns belong to no unit
    x = torch.randn(blocks, 15, size).double() * torch.logspace(-2, 2, size).double()
    damping = 1e-2 * x.square().sum(1).mean(1)
    w = torch.randn(blocks, 4, size).double()
    h = x.transpose(1, 2) @ x + damping[:, None, None] * torch.eye(size).double()
    rows = blocks if blockwise else 1
    columns = torch.randperm(size)[: units * wide].reshape(1, units, wide).repeat(rows, 1, 1)

    def scores(inverse: Any, gram: Any) -> Any:
        reader = Weight(inverse, gram, size, columns, blocks, blockwise)
        return eliminated([reader], rows, units)

    full = scores(FullInverse(torch.linalg.inv(h)), FullGram(w.transpose(1, 2) @ w))
    np.testing.assert_allclose(scores(ThinInverse(x, damping), ThinGram(w)), full, rtol=1e-6)


@pytest.mark.parametrize("counts", [[3, 4], [3, 9, 30]])
@pytest.mark.parametrize("centred", [True, False])
def test_inputs_are_the_same_few_or_many(counts: list[int], centred: bool) -> None:
    parts = [hard(2, n, 10) for n in counts]
    inputs = Inputs()
    for part in parts:
        inputs.add(part)
    x = torch.cat(parts, 1).double()
    if centred:
        x = x - x.mean(1, keepdim=True)
    assert (inputs.vectors(centred) is not None) == (sum(counts) < 10)
    scale = torch.cat(parts, 1).double().square().sum(1)
    near = 1e-6 * (scale[:, :, None] * scale[:, None, :]).sqrt()
    assert bool(((inputs.products(centred) - x.transpose(1, 2) @ x).abs() <= near).all())
    assert bool(((inputs.squares(centred) - x.square().sum(1)).abs() <= 1e-6 * scale).all())


class Alike(nn.Module):
    """Three layers read the same; the last one what was written to in between, if asked to."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.up = nn.Linear(5, 8)
        self.q, self.k, self.v = (nn.Linear(8, 4, bias=i > 0) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        out = self.q(h) + self.k(h)
        if self.written:
            h.mul_(2)
        return out + self.v(h)


@pytest.mark.parametrize("written", [False, True])
def test_sites_that_read_the_same_share_it_unless_it_is_written_to(written: bool) -> None:
    model, x = Alike(written).eval(), torch.randn(30, 5)
    analysis = depcut.analyze(model, x)
    data = analysis.calibrate([x, x + 1], progress=False)
    work = _Elimination(Context(analysis.coupling, model, 0, Score("obs"), data))
    with closing(visits(analysis.coupling, model, data, work.shown)) as walk:
        for visit in walk:
            work._gather(*visit)
    leaders = {site.name: leader.name for site, leader in work.leaders.items()}
    assert leaders == ({} if written else {"k": "q", "v": "q"})
    inputs = {site.name: read for site, read in work.gathered.inputs.items()}
    assert set(inputs) == ({"q", "k", "v"} if written else {"q"})
    for name, times in (("q", 1), ("v", 2 if written else 1)):
        read = (model.up(torch.cat([x, x + 1])).relu() * times).double()
        found = inputs[leaders.get(name, name)]
        assert found.count == 60
        torch.testing.assert_close(
            found.squares(False)[0], read.square().sum(0).detach(), rtol=1e-5, atol=1e-6
        )
