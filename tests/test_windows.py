"""Sums over patches from correlations of shifted images, against the patches themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from depcut.calibration.folds import Folds
from depcut.calibration.inputs import Inputs
from depcut.calibration.moments import Vectors
from depcut.calibration.windows import Windows, WindowSums
from depcut.ops.convolution import Patches
from depcut.support.processes import ALONE

FAMILY = Patches(2, transposed=False)


def call(images: Tensor, kernel: tuple[int, ...] = (3, 3), **options: Any) -> dict[str, Any]:
    """Arguments of a convolution."""
    given = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1} | options
    return {"input": images, "weight": torch.zeros(4, images.shape[1], *kernel), **given}


def windows(given: dict[str, Any], family: Any = FAMILY) -> Windows | None:
    site: Any = SimpleNamespace(family=family)
    return Windows.of(site, given)


SHAPES = [
    ((9, 8), {}),
    ((7, 11), {"kernel": (3, 2), "dilation": [1, 2], "padding": [0, 1]}),
    ((6, 9), {"kernel": (1, 3), "padding": [0]}),
    ((12, 10), {"kernel": (5, 3), "padding": 3}),
]


@pytest.mark.parametrize(("sizes", "options"), SHAPES, ids=str)
def test_sums_are_those_of_the_patches(sizes: tuple[int, int], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    # Images of several sizes, means that are large, move and differ by channel.
    parts = [torch.randn(n, 16, sizes[0] + n, sizes[1]) + 10 * n for n in (3, 4, 1)]
    parts = [(p + torch.arange(16)[:, None, None]).relu() for p in parts]
    calls = [call(p, **options) for p in parts]
    vectors = [FAMILY.inputs(c) for c in calls]
    targets = [torch.randn(1, v.shape[1], 5) + 3 * i for i, v in enumerate(vectors)]
    inputs, folds, plain = Inputs(), Folds(3), Folds(3)
    for number, (given, x, y) in enumerate(zip(calls, vectors, targets, strict=True)):
        found = windows(given)
        assert found is not None
        assert (found.count, found.length) == x.shape[1:]
        torch.testing.assert_close(found.vectors(), x, rtol=0, atol=0)
        inputs.add(found)
        folds.add(number, found, y)
        plain.add(number, x.double(), y.double())
    whole = torch.cat(vectors, 1).double()
    assert inputs.count == whole.shape[1]
    for centred in (False, True):
        x = whole - whole.mean(1, keepdim=True) if centred else whole
        assert_near(inputs.products(centred), x.transpose(1, 2) @ x, x, x)
    for moments, expected in zip(folds.moments("", ALONE), plain.moments("", ALONE), strict=True):
        assert moments.count == expected.count
        for name in ("x", "y", "yy", "xx", "yx"):
            torch.testing.assert_close(
                getattr(moments, name), getattr(expected, name), rtol=1e-5, atol=1e-3
            )


def assert_near(found: Tensor, expected: Tensor, a: Tensor, b: Tensor) -> None:
    scale = a.norm(dim=1)[:, :, None] * b.norm(dim=1)[:, None, :]
    assert bool(((found - expected).abs() <= 3e-6 * scale).all())


def test_few_patches_are_kept_as_they_are() -> None:
    given = [call(torch.randn(1, 16, 7, 7)) for _ in range(2)]
    inputs, folds = Inputs(), Folds(2)
    for number, one in enumerate(given):
        found = windows(one)
        assert found is not None
        inputs.add(found)
        folds.add(number, found, torch.zeros(1, 49, 2))
    expected = torch.cat([FAMILY.inputs(one) for one in given], 1).double()
    moments = folds.moments("", ALONE)
    for one in given:
        one["input"].zero_()  # as what follows may do
    kept = inputs.vectors(False)
    assert kept is not None
    torch.testing.assert_close(kept, expected)
    assert all(isinstance(fold, Vectors) for fold in moments)
    torch.testing.assert_close(torch.cat([f.inputs for f in moments], 1), expected)  # type: ignore[attr-defined]


def test_what_does_not_overlap_so_is_read_as_it_is() -> None:
    images = torch.randn(2, 16, 9, 9)
    assert windows(call(images)) is not None
    for options in ({"stride": [2, 2]}, {"groups": 2}, {"padding": "same"}, {"kernel": (1, 1)}):
        assert windows(call(images, **options)) is None
    assert windows(call(images[:, :3])) is None
    assert windows(call(images[0])) is None
    assert windows(call(images[..., :4])) is None
    assert windows(call(images.half())) is None
    assert windows(call(images), Patches(2, transposed=True)) is None


def test_lowered_precision_of_products_is_not_used_for_patches() -> None:
    before = torch.get_float32_matmul_precision()
    found = windows(call(torch.randn(2, 16, 9, 9)))
    assert found is not None
    sums = WindowSums(found.taps)
    try:
        torch.set_float32_matmul_precision("medium")
        assert sums.add(found).dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
