"""Criteria that read weights one tensor at a time, from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from depcut.calibration.data import Calibration
from depcut.coupling.groups import Coupling
from depcut.errors import InputError
from depcut.scores import (
    CRITERIA,
    Criterion,
    Score,
    Scores,
    check_criterion,
    is_additive,
    score_name,
)
from depcut.scores.context import Context
from depcut.streaming.weights import Single, Weights

# These read parameters alone, each by itself; those that need data read them as they walk.
STREAMED = ("magnitude", "l2", "l1", "lamp", "random")


@dataclass(frozen=True, eq=False)
class _Streaming(Context):
    """What a criterion reads: weights by name, each read when asked for."""

    read: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Any:
        """Every floating-point parameter that narrows with a group, shared ones once."""
        members = (m.tensor for g in self.coupling.groups for m in g.members)
        names = dict.fromkeys(self.canonical[n] for n in members if n in self.canonical)
        return _Chosen(names, self.read)


class _Chosen(Mapping[str, torch.Tensor]):
    """Some tensors of many, read when asked for."""

    def __init__(self, names: Mapping[str, None], read: Mapping[str, torch.Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read[name]

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def streamable(criterion: str | Score | Criterion, *, has_data: bool) -> Score:
    """A criterion that a checkpoint can be ranked by, refused before any work otherwise.

    Args:
        criterion: One of `STREAMED` or that needs data alone, by name or with options.
        has_data: Whether there is data.

    Raises:
        InputError: It is another one, has no such option, or needs data and there is none.
    """
    wanted = Score(criterion) if isinstance(criterion, str) else criterion
    known = [*STREAMED, *(name for name, method in CRITERIA.items() if method.needs == "data")]
    if not isinstance(wanted, Score) or wanted.name not in known:
        raise InputError(
            f"criterion {score_name(criterion)!r} does not read weights one by one",
            where="score=",
            remedy=f"use one of {', '.join(known)}",
        )
    if has_data:
        CRITERIA[wanted.name].settle(wanted)
    else:
        check_criterion(wanted, None)
    return wanted


def streamed(
    criterion: str | Score | Criterion, weights: Weights, calibration: Calibration | None
) -> Criterion:
    """A criterion that reads a checkpoint in place of the model's own weights.

    Args:
        criterion: One that is `streamable`.
        weights: The checkpoint's.
        calibration: Data, for those that need it.

    Raises:
        InputError: It is another one.
    """
    wanted = streamable(criterion, has_data=calibration is not None)
    method = CRITERIA[wanted.name]
    settled = method.settle(wanted)

    def scores(coupling: Coupling, _: nn.Module, seed: int) -> Scores:
        single: Any = Single(weights)
        return method.function(_Streaming(coupling, single, seed, settled, calibration, weights))

    named: Any = scores
    named.__name__ = score_name(criterion)
    named.additive = is_additive(criterion)
    return scores
