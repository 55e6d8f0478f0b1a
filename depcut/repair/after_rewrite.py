"""After the rewrite: re-solve weights where there is data, fold constants where there is none."""

from __future__ import annotations

from torch import nn

from depcut.calibration.data import Calibration
from depcut.errors import InputError
from depcut.plan.keep import Keep
from depcut.repair.compensate import Compensation, compensate
from depcut.repair.folding import fold_constants, may_fold


def repair(
    slim: nn.Module, model: nn.Module, keep: Keep, data: Calibration | None
) -> Compensation | None:
    """Repair a narrowed model in place: re-solve weights on data, else fold constants.

    Args:
        slim: The narrowed model, verified.
        model: The dense model.
        keep: What stays.
        data: To re-solve weights on; None: only removed constant units are folded into biases.

    Returns:
        What was re-solved, if there is data.
    """
    if data is not None:
        return compensate(slim, model, keep, data)
    if may_fold(keep, model):
        fold_constants(keep, model, slim)
    return None


def wants_repair(compensate: bool | str, has_data: bool) -> bool:
    """Whether to compensate.

    Args:
        compensate: What the user asked for: True, False or "auto".
        has_data: Whether there is calibration data.

    Raises:
        InputError: It is something else, or True without data.
    """
    if compensate not in (True, False, "auto"):
        raise InputError(
            f"compensate is {compensate!r}",
            where="compensate=",
            remedy='use "auto" (if there is data), True or False',
        )
    if compensate is True and not has_data:
        raise InputError(
            "compensation needs data: it re-solves weights for the dense layers' outputs",
            where="compensate=True",
            remedy="pass data=, an iterable of what the model takes; without it, removed units "
            'that are constant are folded into biases, which "auto" does',
        )
    return bool(compensate) and has_data
