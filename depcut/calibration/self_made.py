"""Calibration data that a trained model gives away itself, where there is none."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from depcut.calibration.calls import refuse_lone_loss
from depcut.calibration.data import BATCHES, Calibration, Data, Loss, calibrate
from depcut.calibration.progress import transient
from depcut.capture.inputs import device_of
from depcut.capture.part import Part
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling
from depcut.errors import DepcutError, InputError
from depcut.plan import cost
from depcut.support.failures import first_line, reraise_fatal, shown
from depcut.support.processes import processes
from depcut.support.torch_private import pytree
from depcut.synthetic.choose import make
from depcut.synthetic.fresh import fresh
from depcut.synthetic.subject import SECONDS, Leaves, Made, Subject

AUTO = "auto"
Auto = Literal["auto"]

_EXAMPLES = (16, 160)  # that are made: at least, and at most
# MACs that calibration may take, each example's 25 times: two minutes on a laptop's processor.
_MACS = 2.4e12 / 25
_ACCELERATED = 30  # times as many elsewhere
_ALONE = "the units were judged by their weights alone"


@dataclass(frozen=True, eq=False)
class SelfMade:
    """What came of an attempt to make calibration data from a model.

    Attributes:
        calibration: It; None where none was made.
        held_out: Flat inputs that it does not hold, for judging a result: of the same kind, and of
            others if the recipe knows any.
        note: What was made of what, or why nothing was, for a report.
    """

    calibration: Calibration | None
    held_out: tuple[Leaves, ...]
    note: str


def given_data(data: Any) -> Any:
    """The data that a user passed; None where there is none, or it is to be made.

    Args:
        data: What a user passes as data=.

    Raises:
        InputError: It is another text.
    """
    if isinstance(data, str):
        if data != AUTO:
            raise InputError(
                f"data is {shown(data)}",
                where="data=",
                remedy="pass an iterable of what the model takes, None for weights alone, or "
                '"auto" for inputs made from the model itself',
            )
        return None
    return data


def given_or_made(
    coupling: Coupling,
    model: nn.Module,
    data: Data | Calibration | Auto | None,
    *,
    loss: Loss | None = None,
    batches: int = BATCHES,
    memory: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Calibration | None:
    """The data that was given, read and checked; or what is made from the model.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.
        data: See `calibrate`; "auto": it is made; None: there is none.
        loss: See `calibrate`.
        batches: See `calibrate`.
        memory: See `calibrate`.
        progress: See `calibrate`.
        seed: Of what is made.

    Raises:
        InputError: The data or the loss does not fit the model.
    """
    if data is None or isinstance(data, str):
        refuse_lone_loss(loss)
        auto = given_data(data) is not data
        if not auto:
            return None
        made = self_made(coupling, model, seed=seed, memory=memory, progress=progress)
        return made.calibration
    return calibrate(
        coupling.program,
        model,
        data,
        loss=loss,
        batches=batches,
        memory=memory,
        progress=progress,
    )


@preserved()
def self_made(
    coupling: Coupling,
    model: nn.Module,
    *,
    seed: int = 0,
    memory: int | str | None = None,
    progress: bool = True,
    seconds: float = SECONDS,
) -> SelfMade:
    """Calibration data made from what a trained model knows of its inputs.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.
        seed: Of all that is drawn.
        memory: See `calibrate`.
        progress: Whether to show a progress bar on standard error.
        seconds: That making inputs may take.
    """
    program = coupling.program
    why = _refusal(program, model)
    if why:
        return SelfMade(None, (), f"{why}; {_ALONE}")
    start = time.monotonic()
    try:
        made = _made(program, model, _examples(coupling, model), seed, progress, seconds)
        if made is None:
            what = "no way is known to make inputs of these kinds from a model"
            return SelfMade(None, (), f"{what}; {_ALONE}")
        items = [_item(program, model, leaves) for leaves in made.items]
        last = len(items) - (len(items) > 1)  # one is held out
        calibration = calibrate(
            program, model, items[:last], batches=last, memory=memory, progress=progress
        )
    except Exception as error:  # noqa: BLE001  nobody asked for data: what goes without, goes on
        reraise_fatal(error)
        what = error.what if isinstance(error, DepcutError) else first_line(error)
        return SelfMade(None, (), f"inputs could not be made from the model: {what}; {_ALONE}")
    spent = time.monotonic() - start
    total = calibration.rows + sum(_rows(leaves) for leaves in made.items[last:])
    said = [f"no data was given; {total} examples were made in {spent:.0f} s: {made.recipe}"]
    note = "; ".join([*said, *filter(None, [made.match])])
    held_out = (*made.items[last:], *made.others)
    return SelfMade(replace(calibration, made=note), held_out, note)


def _made(
    program: Program, model: nn.Module, examples: int, seed: int, progress: bool, seconds: float
) -> Made | None:
    with transient(shown=progress) as shown:
        task = shown.add_task("make inputs", total=1.0)
        subject = Subject(
            program,
            model,
            examples,
            seed,
            seconds,
            advance=lambda share: shown.update(task, completed=share),
        )
        return make(subject)


def _refusal(program: Program, model: nn.Module) -> str:
    """Why no inputs are made; "" where they are."""
    if processes().size > 1:
        return "no data was given, and inputs are made from a model in a single process alone"
    if isinstance(model, Part):
        return "no data was given, and inputs of a part are not made"
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return "no data was given, and some weights have no values here"
    if fresh(program, model):
        return (
            "no data was given, and the weights look as they were drawn: an untrained model knows "
            "nothing of its inputs"
        )
    return ""


def _examples(coupling: Coupling, model: nn.Module) -> int:
    """How many examples calibration has time for."""
    least, most = _EXAMPLES
    pace = _MACS if device_of(model).type == "cpu" else _MACS * _ACCELERATED
    return int(min(most, max(least, pace // max(cost.macs(coupling).total, 1))))


def _rows(leaves: Leaves) -> int:
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)
    return next((len(leaf) for leaf in tensors), 1)


def _item(program: Program, model: nn.Module, leaves: Leaves) -> Any:
    """What a user would pass as an item of data."""
    args, kwargs = pytree.tree_unflatten(
        [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
        program.in_spec,
    )
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], torch.Tensor) else tuple(args)
    if not args:
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    if len(args) > len(names):
        raise InputError("some of its inputs have no names")
    return {**dict(zip(names, args, strict=False)), **kwargs}
