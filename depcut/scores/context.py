"""What a criterion is told, and how it is looked up: small frozen records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from depcut.calibration.data import Calibration
from depcut.coupling import Coupling
from depcut.errors import InputError

Scores = list[NDArray[np.float64]]

AGGREGATES = ("sum", "mean", "max")
MEMBERS = ("all", "producers", "consumers")
NORMALIZATIONS = ("none", "mean", "size", "zscore")


@dataclass(frozen=True)
class Score:
    """A criterion by name, with how it sums up a unit's members and compares groups.

    Attributes:
        name: Of the criterion.
        aggregate: "sum", "mean" or "max" over the members (tensors) of a unit; None: its default.
        members: "all", "producers" (rows of the weights that make a unit, biases, norms) or
            "consumers" (columns of the weights that read it); None: its default.
        normalize: Across groups: "none", "mean" (divided by the group's mean), "size" (divided by
            the number of elements of a unit) or "zscore"; None: its default.
    """

    name: str
    aggregate: str | None = None
    members: str | None = None
    normalize: str | None = None

    def __post_init__(self) -> None:
        for option, allowed in (
            ("aggregate", AGGREGATES),
            ("members", MEMBERS),
            ("normalize", NORMALIZATIONS),
        ):
            value = getattr(self, option)
            if value is not None and value not in allowed:
                raise InputError(
                    f"{option} is {value!r}",
                    where=f"Score({self.name!r})",
                    remedy=f"use one of {', '.join(allowed)}",
                )


@dataclass(frozen=True, eq=False)
class Context:
    """What a criterion reads.

    Attributes:
        coupling: Groups and where they occur.
        model: Whose weights are read.
        seed: For criteria that draw.
        score: How to aggregate and normalize.
        calibration: Data, with a loss if the criterion needs one; None for those that need none.
    """

    coupling: Coupling
    model: nn.Module
    seed: int
    score: Score
    calibration: Calibration | None = None

    @property
    def data(self) -> Calibration:
        """The calibration data, which a criterion that needs some was given."""
        assert self.calibration is not None
        return self.calibration


@dataclass(frozen=True)
class Method:
    """A criterion of the table.

    Attributes:
        function: From a context to one vector a group, higher is kept.
        needs: "" (weights alone), "data" (inputs) or "loss" (inputs, targets and a loss).
    """

    function: Callable[[Context], Scores]
    needs: str = ""
