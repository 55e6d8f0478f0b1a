"""Scores of units, one vector a group, by a criterion's name or a user's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import torch
from torch import nn

from depcut.calibration.data import Calibration
from depcut.coupling.groups import Coupling
from depcut.errors import DepcutError, InputError
from depcut.scores.context import CRITERIA, Context, Score, Scores
from depcut.support.failures import first_line, reraise_fatal, shown

__all__ = [
    "CRITERIA",
    "Criterion",
    "Score",
    "Scores",
    "check_criterion",
    "is_additive",
    "is_initial",
    "needs_of",
    "score",
    "score_name",
]

Criterion = Callable[[Coupling, nn.Module, int], Scores]

# Each file of this folder registers its criteria.
for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

_MISSING = {"data": ("data", "pass data="), "loss": ("data and a loss", "pass data= and loss=")}


def score(
    criterion: str | Score | Criterion,
    coupling: Coupling,
    model: nn.Module,
    seed: int,
    calibration: Calibration | None = None,
) -> Scores:
    """Scores of all units, higher is kept: one vector a group, of length `group.size`.

    For a group with an outer axis it may be an array [group.rows, group.size]: the group then keeps
    the best units of each row.

    Args:
        criterion: Name, name with options, or a function of (coupling, model, seed) with the same
            result.
        coupling: Groups and where they occur.
        model: Whose weights are read.
        seed: For criteria that draw.
        calibration: Data, and a loss, for criteria that need them.

    Raises:
        InputError: Unknown name, missing data or loss, or the criterion returned something else
            than such vectors.
    """
    if callable(criterion):
        label = shown(getattr(criterion, "__name__", criterion))
        results = _returned(criterion, label, coupling, model, seed)
    else:
        check_criterion(criterion, calibration)
        wanted = Score(criterion) if isinstance(criterion, str) else criterion
        label, method = repr(wanted.name), CRITERIA[wanted.name]
        context = Context(coupling, model, seed, method.settle(wanted), calibration)
        results = method.function(context)
        if method.needs and coupling.program.others:
            results = _or_norms(results, context)
    try:
        scores = [np.asarray(s, dtype=np.float64) for s in results]
    except Exception as error:  # noqa: BLE001  (whatever it is: no vectors)
        reraise_fatal(error)
        scores = []
    scores = _of_first_process(scores, calibration)
    shapes = [((g.size,), (g.rows, g.size) if g.row_axis else None) for g in coupling.groups]
    if len(scores) != len(shapes) or not all(
        s.shape in known for s, known in zip(scores, shapes, strict=True)
    ):
        raise InputError(
            "the criterion returned vectors that do not match the groups",
            where=f"score={label}",
            remedy="return one vector of length group.size for every group, in order, or an array "
            "[group.rows, group.size] for one that has group.row_axis",
        )
    for group, values in zip(coupling.groups, scores, strict=True):
        if not np.isfinite(values).all():
            raise InputError(
                f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite",
                where=f"group {group.name!r}",
                remedy="look for NaN or infinite weights in its layers, or use another criterion",
            )
    return scores


def _of_first_process(scores: Scores, calibration: Calibration | None) -> Scores:
    """The scores of the first process, which rounding on unlike machines cannot change."""
    if calibration is None or calibration.everyone.size == 1:
        return scores
    held = [torch.from_numpy(s.copy()) for s in scores]
    return [s.numpy() for s in calibration.everyone.of_first("scores", held)]


def _or_norms(scores: Scores, context: Context) -> Scores:
    """The scores; L2 norms for groups whose weights only other example calls than the data's run.

    Without gradients and activations, all of their units would be equal.
    """
    read = context.coupling.program.read
    norms = CRITERIA["l2"]
    plain = norms.function(replace(context, score=norms.settle(Score("l2")), calibration=None))
    return [
        norm if read.isdisjoint(m.tensor for m in group.members) and not np.ptp(values) else values
        for group, values, norm in zip(context.coupling.groups, scores, plain, strict=True)
    ]


def _returned(
    criterion: Criterion, label: str, coupling: Coupling, model: nn.Module, seed: int
) -> Scores:
    """What a user's function returns."""
    try:
        return criterion(coupling, model, seed)
    except DepcutError:
        raise
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the criterion failed: {first_line(error)}",
            where=f"score={label}",
            remedy="it gets (coupling, model, seed) and returns one vector a group",
        ) from error


def check_criterion(criterion: str | Score | Criterion, calibration: Calibration | None) -> None:
    """Refuse, before any work, a criterion that is unknown or lacks what it needs.

    Args:
        criterion: Name, name with options, or a function.
        calibration: Data, and perhaps a loss, or None.

    Raises:
        InputError: It is unknown, has no such option, or needs data or a loss.
    """
    if callable(criterion):
        return
    wanted = Score(criterion) if isinstance(criterion, str) else criterion
    if not isinstance(wanted, Score) or wanted.name not in CRITERIA:
        raise InputError(
            f"unknown criterion {shown(wanted.name if isinstance(wanted, Score) else wanted)}",
            where="score=",
            remedy=f"use one of {', '.join(CRITERIA)}, or pass a function",
        )
    method = CRITERIA[wanted.name]
    method.settle(wanted)
    has_loss = calibration is not None and calibration.loss is not None
    if method.needs and (calibration is None or (method.needs == "loss" and not has_loss)):
        what, remedy = _MISSING[method.needs]
        raise InputError(
            f"criterion {wanted.name!r} needs {what}", where="score=", remedy=f"{remedy}"
        )


def is_additive(criterion: str | Score | Criterion) -> bool:
    """Whether scores are losses that add up, also over groups; else they only rank.

    Args:
        criterion: Name, name with options, or a function, which may say so by an attribute
            `additive`.
    """
    if callable(criterion):
        return bool(getattr(criterion, "additive", False))
    name = criterion.name if isinstance(criterion, Score) else criterion
    return name in CRITERIA and CRITERIA[name].additive


def is_initial(criterion: str | Score | Criterion) -> bool:
    """Whether a criterion is made for weights as they were drawn.

    Args:
        criterion: Name, name with options, or a function.
    """
    name = criterion.name if isinstance(criterion, Score) else criterion
    return isinstance(name, str) and name in CRITERIA and CRITERIA[name].initial


def needs_of(criterion: str | Score | Criterion) -> str:
    """What a criterion reads beside weights: "", "data" or "loss"; a function reads nothing else.

    Args:
        criterion: Name, name with options, or a function.
    """
    name = criterion.name if isinstance(criterion, Score) else criterion
    return CRITERIA[name].needs if isinstance(name, str) and name in CRITERIA else ""


def score_name(criterion: str | Score | Criterion) -> str:
    """A criterion's name and options, for records.

    Args:
        criterion: Name, name with options, or a function.
    """
    if isinstance(criterion, Score):
        options = (criterion.aggregate, criterion.members, criterion.normalize)
        return " ".join([criterion.name, *(o for o in options if o is not None)])
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "")
