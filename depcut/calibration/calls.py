"""The calls of a model that a stage relies on, and what calibration cannot do without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import nn

from depcut.calibration.data import Calibration
from depcut.capture.eager import Call, blaming_inputs
from depcut.capture.program import Program
from depcut.errors import InputError


def blaming_calls(
    model: nn.Module, program: Program, calibration: Calibration | None
) -> AbstractContextManager[None]:
    """`blaming_inputs` for a stage that relies on the captured call and on those of the data.

    Args:
        model: The dense model; it is only read.
        program: The captured model.
        calibration: Its data, or None.
    """
    return blaming_inputs(model, lambda: _calls(program, calibration))


def _calls(program: Program, calibration: Calibration | None) -> Iterator[Call]:
    yield "inputs=,", program.args, program.kwargs
    if calibration is None:
        return
    for number, batch in zip(calibration.numbers, calibration.batches, strict=True):
        yield f"data, item {number},", batch.args, batch.kwargs


def refuse_lone_loss(loss: object) -> None:
    """Refuse a loss where there is no data.

    Args:
        loss: What the user passed as loss=.

    Raises:
        InputError: There is one.
    """
    if loss is not None:
        raise InputError(
            "there is a loss, and no data to take it of",
            where="loss=",
            remedy="pass data= too, or leave loss out",
        )
