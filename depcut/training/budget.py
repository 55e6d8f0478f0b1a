"""One budget of epochs for training and pruning together (BIMP).

Source: Zimmer, Spiegel, Pokutta, How I Learned to Stop Worrying and Love Retraining, ICLR 2023,
section 4 (budgeted iterative magnitude pruning): the dense phase is shortened and ends at a rate of
zero (linear schedule, Li et al. 2020), and the rest goes in equal parts to prune-retrain cycles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import Unpack

from depcut.allocate.choose import check_ratio
from depcut.calibration.data import Data, Loss
from depcut.capture.inputs import Inputs
from depcut.errors import InputError
from depcut.options import IterateKeywords, Options
from depcut.support.checks import check_function, check_integer, check_items, check_kind
from depcut.support.keywords import takes_options
from depcut.training.iterative import Iterated, MakeOptimizer, geometric, iterate


@dataclass(frozen=True)
class Phase:
    """One phase of training: dense, or a cycle of pruning and retraining.

    Attributes:
        kind: "dense", or "cycle": prune first, then train.
        epochs: How long.
        ratio: Fraction of the dense quantity that is gone while it lasts.
        schedule: Name of its learning rate schedule.
    """

    kind: str
    epochs: int
    ratio: float
    schedule: str


Train = Callable[[nn.Module, Phase], Any]
_MOST = 10**9  # epochs


def budget_phases(
    epochs: int,
    ratio: float,
    cycles: int = 1,
    *,
    dense: float = 0.5,
    schedule: str = "allr",
) -> tuple[Phase, ...]:
    """Split a budget of epochs into a dense phase and equal prune-retrain cycles.

    Source: Zimmer et al., ICLR 2023, section 4. The dense phase has a linear schedule from its peak
    to zero ("llr"), the cycles have the paper's adaptive linear one ("allr") unless told otherwise;
    each cycle removes the same share of what is left.

    Args:
        epochs: All in all.
        ratio: Fraction removed in the end, in (0, 1).
        cycles: Number of prune-retrain cycles.
        dense: Share of the epochs for the dense phase; what does not divide evenly goes there.
        schedule: Name of the schedule of a cycle, for the train function to read.

    Raises:
        InputError: An argument is out of range, or there are too few epochs for the cycles.
    """
    check_ratio(ratio, "ratio=")
    check_ratio(dense, "dense=")
    check_kind(schedule, str, "schedule", "pass the name of a schedule")
    epochs = check_integer(epochs, "epochs", 1, _MOST)
    cycles = check_integer(cycles, "cycles", 1, _MOST)
    each = round(epochs * (1 - dense)) // cycles
    if not each or epochs - each * cycles < 1:
        raise InputError(
            f"{epochs} epochs are too few for a dense phase and {cycles} cycles",
            where="epochs=",
            remedy="pass more epochs, fewer cycles, or another dense= share",
        )
    first = Phase("dense", epochs - each * cycles, 0.0, "llr")
    return (first, *(Phase("cycle", each, r, schedule) for r in geometric(ratio, cycles)))


@takes_options(Options, IterateKeywords)
def run_phases(
    model: nn.Module,
    phases: Sequence[Phase],
    inputs: Inputs = None,
    *,
    train: Train,
    data: Data | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    **given: Unpack[IterateKeywords],
) -> Iterated:
    """Carry out phases: train, then prune and train in turns.

    Args:
        model: The model to train; it is not changed, a copy is trained.
        phases: As of `budget_phases`; ratios must increase.
        train: Called as train(model, phase), or train(model, phase, optimizer) if there is one; it
            trains in place for `phase.epochs` epochs. What it raises is not caught.
        inputs: Example inputs, as for `depcut.shrink`.
        data: Calibration data, as for `iterate`.
        loss: As for `iterate`.
        optimizer: As for `iterate`.
        checkpoint: As for `iterate`.
        options: What else is chosen, as one object; the keywords that follow go before it.
        **given: The fields of `depcut.Options`.

    Raises:
        DepcutError: See `depcut.training.iterate`.
    """
    remedy = "pass what depcut.training.budget_phases returned"
    listed = check_items(phases, "phases", remedy)
    for each in listed or (None,):
        check_kind(each, Phase, "phases", remedy)
    check_function(train, "train", "pass a function of (model, phase)")

    def retrain(slim: nn.Module, step: int, *optimizer: Any) -> Any:
        return train(slim, listed[step], *optimizer)

    return iterate(
        model,
        None,
        inputs,
        steps=[p.ratio for p in listed],
        retrain=retrain,
        data=data,
        loss=loss,
        optimizer=optimizer,
        checkpoint=checkpoint,
        options=options,
        **given,
    )
