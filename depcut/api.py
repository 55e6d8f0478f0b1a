"""One call from a model to a smaller one."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import nn
from typing_extensions import Unpack

from depcut.allocate.choose import check_budget
from depcut.analysis import analyze
from depcut.calibration.data import Data, Loss, read_with_inputs
from depcut.calibration.self_made import AUTO, Auto, given_data
from depcut.capture.inputs import Inputs
from depcut.capture.plain import plain
from depcut.capture.results import Outputs
from depcut.options import Options, ShrinkKeywords
from depcut.repair.after_rewrite import wants_repair
from depcut.shrinking.smaller import smaller
from depcut.support.keywords import settled, takes_options
from depcut.support.processes import together_on_data
from depcut.support.sharded import sharding_of
from depcut.support.unwrap import unwrapped

ModelT = TypeVar("ModelT", bound=nn.Module)


@takes_options(Options, ShrinkKeywords)
@together_on_data
def shrink(
    model: ModelT,
    ratio: float | None = None,
    inputs: Inputs = None,
    *,
    outputs: Outputs = None,
    data: Data | Auto | None = AUTO,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    part: str | None = None,
    options: Options | None = None,
    **given: Unpack[ShrinkKeywords],
) -> ModelT:
    """A smaller model of the same class that computes the same on the units that stay.

    Args:
        model: Any module that torch.export can capture; it is not changed. Of one that
            `fully_shard` has sharded, the result is sharded alike.
        ratio: Fraction removed of the quantity named by `of`, in (0, 1).
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; or a list of several
            such example calls, all of which must run after the cut (see `depcut.analyze`); left
            out, the first item of the data, or inferred from the first layer where that is
            unambiguous.
        outputs: Names or positions of the outputs that count, see `depcut.analyze`.
        data: Calibration data: any iterable of what the model takes, or of (input, target) pairs;
            of several example calls, of what the first one passes. "auto", where there is none:
            inputs are made from what a trained model knows of them, as `depcut.report` of the
            result says; None: weights alone are looked at.
        loss: A function of (output, target) that returns a scalar, for criteria with gradients;
            "model": the loss that the model itself returns where it is given the labels.
        optimizer: One that trains `model`; its state is sliced, and it trains the result.
        part: Name of a module that alone is captured and made smaller, see `depcut.analyze`; data
            is what the whole model takes.
        options: What else is chosen, as one object; the keywords that follow go before it.
        **given: The fields of `depcut.Options`.

    Raises:
        DepcutError: See `depcut.analyze`, `Analysis.plan` and `Plan.apply`.
    """
    chosen = settled(Options, options, given, ShrinkKeywords, "shrink")
    check_budget(ratio, chosen.of, chosen.latency_ms)
    known = given_data(data)
    wants_repair(chosen.compensate, data is not None)
    own = plain(model)
    sharding_of(unwrapped(model))  # refused before the work, not after it
    items, inputs = read_with_inputs(known, chosen.batches, inputs, own, loss is not None)
    analysis = analyze(own, inputs, outputs, part=part)
    # What was put together for this call is not put together once more.
    dense = model if own is unwrapped(model) else own
    found = items if known is not None else AUTO if data is not None else None
    _, slim = smaller(analysis, dense, ratio, found, chosen, loss=loss, optimizer=optimizer)
    return cast(ModelT, slim)
