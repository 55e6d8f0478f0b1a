"""Numbers of a graph at sizes that are on the way from the captured to a second one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depcut
from depcut.calibration.lengths import with_numbers
from depcut.calibration.reader import Reader
from depcut.capture.program import Program
from depcut.graph.between import between, share_of_way
from depcut.graph.resized import Resized


class Windows(nn.Module):
    """Numbers that follow the length: reshapes, slices, a narrow and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        half = h.shape[1] // 2
        h = torch.cat([h[:, half:], h[:, :half]], 1) * torch.tensor(2.0)
        return self.last(h.reshape(len(x), half, 2, 8).sum(2))


def captured() -> tuple[Program, Resized]:
    """The model at the length 4, and its numbers at 12."""
    model = Windows().eval()
    program = depcut.analyze(model, torch.randn(2, 4, 4)).program
    reader = Reader(program, model, pairs=False)
    batches = tuple(reader.batch(torch.randn(2, n, 4), "") for n in (4, 12))
    _, long = with_numbers(reader, model, batches)
    assert long.resized is not None
    return program, long.resized


def test_halfway_every_number_is_halfway() -> None:
    program, long = captured()
    middle = between(program, long, Fraction(1, 2))
    assert middle is not None
    found = {n.name: middle.sizes[n] for n in program.graph.graph.nodes if n in middle.sizes}
    here = {n.name: s for n, s in program.sizes.items() if n in middle.sizes}
    there = {n.name: long.sizes[n] for n in program.graph.graph.nodes if n in long.sizes}
    lengths = {
        (a, b, c)
        for name in found
        for a, b, c in zip(*map(_flat, (here[name], found[name], there[name])), strict=True)
    }
    assert {(4, 8, 12), (2, 4, 6)} <= lengths
    assert all(2 * b == a + c for a, b, c in lengths)


def _flat(sizes: Any) -> list[int]:
    if isinstance(sizes, tuple | list):
        return [n for part in sizes for n in _flat(part)]
    return [sizes] if isinstance(sizes, int) else []


def test_a_number_that_would_be_none_is_on_no_line() -> None:
    program, long = captured()
    assert between(program, long, Fraction(1, 16)) is None


def test_another_constant_is_on_no_line() -> None:
    program, long = captured()
    changed = {node: value + 1 for node, value in long.constants.items()}
    assert changed, "the net has a constant"
    assert between(program, Resized(long.arguments, changed, long.sizes), Fraction(1, 2)) is None


@pytest.mark.parametrize(
    ("first", "second", "third", "share"),
    [
        (((2, 4),), ((2, 8),), ((2, 6),), Fraction(1, 2)),
        (((2, 4), None), ((2, 8), None), ((2, 12), None), Fraction(2)),
        (((4, 4),), ((8, 8),), ((6, 7),), None),
        (((2, 4),), ((2, 8),), ((3, 6),), None),
        (((2, 4),), ((2, 4),), ((2, 4),), None),
    ],
)
def test_how_far_on_the_way_sizes_are(
    first: Any, second: Any, third: Any, share: Fraction | None
) -> None:
    assert share_of_way(first, second, third) == share
