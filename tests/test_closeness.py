"""Differences of tensors: the largest one, against the scale; what is not finite must be equal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from depcut.support.closeness import Gap, gap, relative_error

INF, NAN = math.inf, math.nan


def t(*values: float, **options: Any) -> Tensor:
    return torch.tensor(values, **options)


@pytest.mark.parametrize(
    ("wanted", "got", "expected"),
    [
        (t(1, -4), t(1.5, -4), Gap(0.5, 4)),
        (t(0.0, 0.0), t(0.0, 0.25), Gap(0.25, 0)),
        (t(2, INF, -INF, NAN), t(3, INF, -INF, NAN), Gap(1, 2)),
        (t(2, INF), t(2, -INF), Gap(INF, 2)),
        (t(2, NAN), t(2, 1), Gap(INF, 2)),
        (t(2, 1), t(2, NAN), Gap(INF, 2)),
        (t(2, 1), t(2, INF), Gap(INF, 2)),
        (t(INF, NAN), t(INF, NAN), Gap(0, 0)),
        (t(INF), t(NAN), Gap(INF, 0)),
        (t(), t(), Gap(0, 0)),
        (t(3 + 4j), t(0j), Gap(5, 5)),
        (t(6e4, dtype=torch.half), t(-6e4, dtype=torch.half), Gap(12e4, 6e4)),
    ],
)
def test_the_largest_difference(wanted: Tensor, got: Tensor, expected: Gap) -> None:
    assert gap(wanted, got) == expected


def test_the_scale_divides_unless_it_is_zero() -> None:
    assert Gap(1, 4).relative == 0.25
    assert Gap(1, 0).relative == 1


@pytest.mark.parametrize(
    ("wanted", "got", "size", "words"),
    [
        ([t(1.0, 2.0), t(10.0)], [t(1.0, 2.5), t(10.5)], 0.25, ""),
        ([t(1)], [t(1), t(2)], INF, "2 outputs instead of 1"),
        ([t(1, 2)], [t(1)], INF, r"shape \(1,\) instead of \(2,\)"),
        ([t(1, 2)], [None], INF, r"shape \(\) instead of \(2,\)"),
        ([t(1.0)], [t(NAN)], INF, "not finite where"),
        ([t(1, dtype=torch.long), "x", None], [t(5, dtype=torch.long), "y", 3], 0, ""),
        ([t(1.0, device="meta")], [t(1.0, device="meta")], 0, ""),
    ],
)
def test_flat_outputs(wanted: list[Any], got: list[Any], size: float, words: str) -> None:
    found, message = relative_error(wanted, got)
    assert found == size
    assert bool(message) == bool(words)
    if words:
        with pytest.raises(ValueError, match=words):
            raise ValueError(message)
