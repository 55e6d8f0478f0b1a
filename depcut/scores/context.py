"""Frozen records: options of a criterion, what it reads, and how it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from depcut.calibration.data import Calibration
from depcut.coupling.groups import Coupling
from depcut.errors import InputError
from depcut.support.checks import check_kind
from depcut.support.failures import shown

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
        check_kind(self.name, str, "name", "pass the name of a criterion")
        for option, allowed in (
            ("aggregate", AGGREGATES),
            ("members", MEMBERS),
            ("normalize", NORMALIZATIONS),
        ):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, str) and value in allowed):
                raise InputError(
                    f"{option} is {shown(value)}",
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

    @cached_property
    def canonical(self) -> dict[str, str]:
        """The name that stands for each parameter: the first of those that share its tensor."""
        dims, aliases = self.coupling.dims, self.coupling.program.aliases
        return {
            name: next(a for a in aliases.get(name, (name,)) if a in dims)
            for name in dims
            if name in self.coupling.program.parameters
        }

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Every floating-point parameter that narrows with a group, shared ones once.

        Raises:
            InputError: One is on the meta device.
        """
        held = dict(self.model.named_parameters(remove_duplicate=False))
        names = dict.fromkeys(
            self.canonical[m.tensor]
            for g in self.coupling.groups
            for m in g.members
            if m.tensor in self.canonical
        )
        weights = {n: held[n].detach() for n in names if held[n].is_floating_point()}
        for name, tensor in weights.items():
            if tensor.is_meta:
                raise InputError(
                    f"criterion {self.score.name!r} needs weights, and these are on the meta "
                    "device",
                    where=name,
                    remedy="load the weights, or pass score='random'",
                )
        return weights


@dataclass(frozen=True)
class Method:
    """A registered criterion, with its defaults; None where it has no such option.

    Attributes:
        function: From a context to one vector a group, higher is kept.
        needs: "" (weights alone), "data" (inputs) or "loss" (inputs, targets and a loss).
        aggregate: See `Score`.
        members: See `Score`.
        normalize: See `Score`.
        additive: Whether scores are losses that add up, also over groups.
        initial: Whether it is made for weights as they were drawn.
    """

    function: Callable[[Context], Scores]
    needs: str = ""
    aggregate: str | None = "sum"
    members: str | None = "all"
    normalize: str | None = "mean"
    additive: bool = False
    initial: bool = False

    def settle(self, score: Score) -> Score:
        """The options as given, and the defaults for the others.

        Raises:
            InputError: The criterion has no such option.
        """
        settled = {}
        for option in ("aggregate", "members", "normalize"):
            given, default = getattr(score, option), getattr(self, option)
            if given is not None and default is None:
                raise InputError(
                    f"criterion {score.name!r} has no option {option}",
                    where=f"Score({score.name!r}, {option}={given!r})",
                    remedy=f"leave {option} out",
                )
            settled[option] = default if given is None else given
        return Score(score.name, **settled)


CRITERIA: dict[str, Method] = {}

Function = TypeVar("Function", bound=Callable[[Context], Scores])


def criterion(
    name: str,
    *,
    needs: Literal["", "data", "loss"] = "",
    aggregate: str | None = "sum",
    members: str | None = "all",
    normalize: str | None = "mean",
    additive: bool = False,
    initial: bool = False,
) -> Callable[[Function], Function]:
    """Register the decorated function as a criterion; the arguments are those of `Method`.

    Args:
        name: What users pass as `score=`.
        needs: "" (weights alone), "data" (inputs) or "loss" (inputs, targets and a loss).
        aggregate: The default, or None where the criterion has no such option; see `Score`.
        members: The same.
        normalize: The same.
        additive: Whether scores are losses that add up, also over groups.
        initial: Whether it is made for weights as they were drawn.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: There is a criterion of that name.
    """

    def register(function: Function) -> Function:
        if name in CRITERIA:
            raise ValueError(f"there are two criteria named {name!r}")
        CRITERIA[name] = Method(function, needs, aggregate, members, normalize, additive, initial)
        return function

    return register
