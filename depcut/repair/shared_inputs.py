"""Sites that multiply the same vectors: seen once, and solved together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from depcut.calibration.data import Calibration
from depcut.calibration.folds import Folds
from depcut.calibration.gaps import Found, Target, of_first_process, solve_gaps

_ROWS = 2048  # of a matrix that are changed at a time


@dataclass
class SharedInputs:
    """What some sites read in the dense and the narrowed graph, see `depcut.calibration.gaps`.

    Attributes:
        calibration: The batches.
        targets: By layer, what is to be reproduced.
        free: Whether there are biases to change.
        kept: Places of the narrowed inputs in the dense ones.
    """

    calibration: Calibration
    targets: dict[str, Target] = field(default_factory=dict)
    free: bool = False
    kept: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        self._folds = Folds(self.calibration.total)
        self._seen: set[int] = set()
        self._found: dict[str, Found] = {}

    def see(self, number: int, narrow: torch.Tensor, dense: torch.Tensor) -> None:
        """Take in a batch, unless another site has shown it.

        Args:
            number: Of the batch, among those of all processes.
            narrow: Vectors (1, vectors, in).
            dense: The same in the dense graph (1, vectors, dense).
        """
        if number in self._seen:
            return
        self._seen.add(number)
        gap = dense.clone()
        gap[..., self.kept] -= narrow
        both = torch.cat([narrow.to(gap), gap], -1)
        self._folds.add(number, both, both[..., :0])

    def found(self, layer: str) -> Found:
        """What is added to the weights of a layer; all are solved when the first is asked for.

        Args:
            layer: It.
        """
        if not self._found:
            everyone, label = self.calibration.everyone, f"inputs of {layer}"
            folds = self._folds.moments(label, everyone)
            found = solve_gaps(folds, self.kept, self.free, list(self.targets.values()))
            self._found = dict(zip(self.targets, found, strict=True))
            self._folds = Folds(self.calibration.total)
            self.targets.clear()
        return of_first_process(layer, self._found.pop(layer), self.calibration.everyone)


def change(
    weight: torch.Tensor, dense: torch.Tensor, rows: torch.Tensor | None, found: Found
) -> torch.Tensor | None:
    """Add what was found to a weight, in place.

    Args:
        weight: W (out, in).
        dense: A (all outputs, dense).
        rows: Those that stay; None: all.
        found: What to add.

    Returns:
        What is added to the dense bias, (out,); None: there is no bias.
    """
    shifts = []
    for start in range(0, len(weight), _ROWS):
        at = slice(start, start + _ROWS)
        some = (dense[at] if rows is None else dense[rows[at]]).double()
        weight[at] += (some @ found.matrix).to(weight.dtype)
        if found.mean is not None:
            shifts.append(some @ found.mean)
    return torch.cat(shifts) if shifts else None


def is_part(
    weight: torch.Tensor, dense: torch.Tensor, rows: torch.Tensor | None, kept: torch.Tensor
) -> bool:
    """Whether a weight is the kept part of the dense one.

    Args:
        weight: W (out, in).
        dense: A (all outputs, dense).
        rows: Those that stay; None: all.
        kept: The columns that stay.
    """
    count = len(dense) if rows is None else len(rows)
    if tuple(weight.shape) != (count, len(kept)) or weight.dtype != dense.dtype:
        return False
    starts: Iterable[int] = range(0, count, _ROWS)
    return all(
        torch.equal(
            weight[s : s + _ROWS],
            (dense[s : s + _ROWS] if rows is None else dense[rows[s : s + _ROWS]])[:, kept],
        )
        for s in starts
    )
