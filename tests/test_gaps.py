"""Least squares from the gap between inputs: those of the outputs, which it never sees."""

import pytest
import torch
from torch import Tensor

from depcut.calibration.folds import Folds
from depcut.calibration.gaps import Target, solve_gaps
from depcut.calibration.moments import Moments, Vectors
from depcut.calibration.solve import LeastSquares, solve
from depcut.repair.shared_inputs import change
from depcut.support.processes import ALONE


def problem(vectors: int) -> tuple[Tensor, ...]:
    """Dense inputs, narrowed ones that drifted, the places that stay, and a dense matrix."""
    generator = torch.Generator().manual_seed(vectors)
    mixed = torch.randn(12, 12, generator=generator)
    dense = torch.randn(vectors, 12, generator=generator) @ mixed + 0.5
    kept = torch.tensor([0, 1, 3, 4, 6, 7, 10, 11])
    narrow = dense[:, kept] + 0.1 * torch.randn(vectors, 8, generator=generator)
    return dense, narrow, kept, torch.randn(40, 12, generator=generator)


def directly(
    batches: list[tuple[Tensor, Tensor]], kept: Tensor, matrix: Tensor, biases: list[Tensor] | None
) -> LeastSquares:
    """The same from the outputs."""
    folds = Folds(len(batches))
    for number, (z, x) in enumerate(batches):
        y = z @ matrix.T + (biases[0] if biases else 0)
        folds.add(number, x[None], y[None])
    found = folds.moments("", ALONE)
    return solve(found, matrix[None][:, :, kept], biases[1][None] if biases else None)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("vectors", "count"), [(400, 4), (12, 2), (30, 2), (40, 1)])
def test_the_gap_between_inputs_gives_the_weights_that_outputs_give(
    vectors: int, count: int, free: bool
) -> None:
    dense, narrow, kept, matrix = problem(vectors)
    batches = list(zip(dense.chunk(count), narrow.chunk(count), strict=True))
    biases = [torch.randn(40), torch.randn(40)] if free else None
    expected = directly(batches, kept, matrix, biases)
    folds = Folds(count)
    for number, (z, x) in enumerate(batches):
        gap = z.clone()
        gap[:, kept] -= x
        both = torch.cat([x, gap], 1)[None]
        folds.add(number, both, both[..., :0])
    parts = folds.moments("", ALONE)
    assert isinstance(parts[0], Moments if vectors >= 20 else Vectors)
    target = Target.of(matrix, biases[0] - biases[1] if biases else None)
    (found,) = solve_gaps(parts, kept, free, [target])
    assert found.ridge == expected.ridge
    assert found.before == pytest.approx(expected.before, rel=1e-5)
    assert found.after == pytest.approx(expected.after, rel=1e-5)
    weight = matrix[:, kept].clone()
    shift = change(weight, matrix, None, found)
    torch.testing.assert_close(weight, expected.weight[0].float(), rtol=1e-4, atol=1e-5)
    if biases:
        assert shift is not None
        bias = (biases[0] + shift).float()
        torch.testing.assert_close(bias, expected.bias[0].float(), rtol=1e-4, atol=1e-4)
