"""Learning-rate schedules of retraining, stepped once an iteration.

T is the length of the original schedule in steps, T_rt that of retraining, W = floor(T_rt / 10) the
warm-up. Sources: FT, Han et al., NeurIPS 2015; LRW, Renda et al., ICLR 2020; SLR and CLR, Le & Hua,
ICLR 2021; LLR and ALLR, Zimmer, Spiegel & Pokutta, ICLR 2023, section 3.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from depcut.errors import InputError
from depcut.support.checks import check_integer, check_items, check_kind, check_number
from depcut.support.failures import shown
from depcut.support.torch_private import set_epoch

_MOST = 10**12  # steps
Rates = Callable[[int], float] | Sequence[float]


@dataclass(frozen=True)
class OriginalSchedule:
    """The learning rates that the dense model was trained with.

    Attributes:
        rates: A function from the step (from 0 on) to the rate, or the rates themselves.
        length: T, the number of steps; that of the sequence if left out.
        peak: Its largest rate; taken from the rates if left out.
    """

    rates: Rates | None = None
    length: int | None = None
    peak: float | None = None

    def __post_init__(self) -> None:
        where = "OriginalSchedule({}=)".format
        if self.rates is not None and not callable(self.rates):
            self._check_sequence()
        if self.length is not None:
            _whole(self.length, where("length"))
        if self.peak is not None:
            remedy = "pass a positive number"
            what = f"the peak rate is {shown(self.peak)}"
            check_number(self.peak, "original", remedy, above=0, what=what)

    def _check_sequence(self) -> None:
        rates: Any = self.rates
        texts = isinstance(rates, str | bytes | bytearray | Mapping)
        if texts or not hasattr(rates, "__len__") or not hasattr(rates, "__getitem__"):
            raise InputError(
                f"rates is a {type(rates).__name__}",
                where="OriginalSchedule(rates=)",
                remedy="pass a sequence of rates, or a function from the step to the rate",
            )

    @cached_property
    def steps(self) -> int | None:
        """T, None if it is not known."""
        if self.length is not None:
            return _whole(self.length, "OriginalSchedule(length=)")
        if self.rates is None or callable(self.rates):
            return None
        return _whole(len(self.rates), "OriginalSchedule(rates=)")

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """The rate of every step.

        Raises:
            InputError: They are not known, not as many as said, negative or not finite.
        """
        if self.rates is None or self.steps is None:
            raise InputError(
                "this schedule follows the original rates, and only "
                + ("their peak is known" if self.rates is None else "their function, not T"),
                where="original=",
                remedy="pass depcut.training.OriginalSchedule(rates, length): rates is a sequence "
                "or a function of the step, length the number of steps",
            )
        given = map(self.rates, range(self.steps)) if callable(self.rates) else self.rates
        remedy = "pass the rates, or a function from the step to the rate"
        values = np.array(
            [
                check_number(v, "a rate", remedy, where="original=")
                for v in check_items(given, "original", remedy)
            ]
        )
        if len(values) != self.steps:
            raise InputError(
                f"there are {len(values)} rates for {self.steps} steps",
                where="original=",
                remedy="pass one rate a step, and leave length out",
            )
        wrong = np.flatnonzero(~np.isfinite(values) | (values < 0))
        if len(wrong):
            raise InputError(
                f"the original rate of step {wrong[0]} is {values[wrong[0]]}",
                where="original=",
                remedy="rates are finite and not negative",
            )
        return values

    @cached_property
    def top(self) -> float:
        """The peak rate.

        Raises:
            InputError: It is no positive number.
        """
        peak = float(self.values.max()) if self.peak is None else self.peak
        what = f"the peak rate is {shown(peak)}"
        return check_number(peak, "original", "pass a positive number", above=0, what=what)


class RetrainingSchedule(LRScheduler, ABC):
    """Base of the schedules: one rate a step, shared by the groups in their proportions.

    The parameter group with the largest rate follows the schedule exactly, the others keep their
    ratio to it. Step i (from 0 on) is taken at the i-th rate; after the last one, `step` may be
    called once more, as loops do.

    Args:
        optimizer: Whose rates it sets.
        original: The original schedule, or its peak rate where no more is needed.
        steps: T_rt, the number of iterations of retraining.
        distance: See `depcut.training.relative_distance`; of ALLR only.
        last_epoch: As of torch's schedules.

    Raises:
        InputError: Something is missing or out of its range.
    """

    warmup = 0.1

    def __init__(
        self,
        optimizer: Optimizer,
        original: OriginalSchedule | float,
        steps: int,
        *,
        distance: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        check_kind(optimizer, Optimizer, "optimizer", "pass a torch.optim.Optimizer")
        if distance is not None:
            check_kind(distance, float, "distance", "pass what relative_distance returned")
        if not isinstance(original, OriginalSchedule):
            original = OriginalSchedule(peak=original)
        self.original, self.distance = original, distance
        self.steps = _whole(steps, "steps=")
        self.ramp = int(self.warmup * self.steps)
        self.peak = self.start()
        super().__init__(optimizer, last_epoch)

    def start(self) -> float:
        """The rate that the warm-up leads to."""
        return self.original.top

    @abstractmethod
    def curve(self, done: float) -> float:
        """The rate after the warm-up, at a share in [0, 1] of the steps that follow it."""

    def rate(self, step: int) -> float:
        """The rate of a step.

        Raises:
            InputError: The step is past the end.
        """
        if not 0 <= step <= self.steps:
            raise InputError(
                f"step {step} is outside of the schedule's {self.steps} steps",
                where=type(self).__name__,
                remedy="make it with steps= as large as the number of optimizer steps",
            )
        if step < self.ramp:
            return self.peak * step / self.ramp
        return self.curve((step - self.ramp) / (self.steps - self.ramp))

    def get_lr(self) -> list[Any]:
        """The rate of every group at the present step."""
        base = [float(b) for b in self.base_lrs]
        if not max(base, default=0.0) > 0:
            raise InputError(
                f"the optimizer's groups have the rates {base}, so their proportions are unknown",
                where=type(self).__name__,
                remedy="make the optimizer with a positive lr",
            )
        rate = self.rate(self.last_epoch)
        return [rate * (b / max(base)) for b in base]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next step's rate.

        Raises:
            InputError: There is none.
        """
        self.rate(self.last_epoch + 1 if epoch is None else epoch)
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which a schedule of the same arguments goes on."""
        return {
            "schedule": type(self).__name__,
            "steps": self.steps,
            "peak": self.peak,
            "last_epoch": self.last_epoch,
            "base_lrs": [float(b) for b in self.base_lrs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another one was; the optimizer's rates are set.

        Raises:
            InputError: It was another schedule.
        """
        mine = self.state_dict()
        for key in ("schedule", "steps", "peak"):
            if state_dict.get(key) != mine[key]:
                raise InputError(
                    f"the state is of another schedule: {key} is {state_dict.get(key)!r}, "
                    f"not {mine[key]!r}",
                    where=type(self).__name__,
                    remedy="make the schedule with the arguments that it had",
                )
        self.base_lrs = list(state_dict["base_lrs"])
        set_epoch(self, int(state_dict["last_epoch"]))


class FT(RetrainingSchedule):
    """Fine-tuning: constant at the last rate of the original schedule (Han et al. 2015)."""

    warmup = 0.0

    def start(self) -> float:
        """The last original rate."""
        return float(self.original.values[-1])

    def curve(self, done: float) -> float:  # noqa: ARG002
        """Constant."""
        return self.peak


class LRW(RetrainingSchedule):
    """Learning-rate rewinding: the last T_rt steps of the original schedule (Renda et al. 2020)."""

    warmup = 0.0

    def start(self) -> float:
        """The first rate of the part that is replayed."""
        values = self.original.values
        if self.steps > len(values):
            raise InputError(
                f"the last {self.steps} steps of an original schedule of {len(values)} steps",
                where="LRW",
                remedy="retrain for at most as many steps, or use another schedule, e.g. LLR",
            )
        return float(values[-self.steps])

    def rate(self, step: int) -> float:
        """Rate T - T_rt + step of the original schedule, its last one at the end."""
        super().rate(step)
        values = self.original.values
        return float(values[min(len(values) - self.steps + step, len(values) - 1)])

    def curve(self, done: float) -> float:  # noqa: ARG002
        """Not used: `rate` replays the original schedule."""
        return self.peak


class SLR(RetrainingSchedule):
    """Scaled restart: the whole original schedule in T_rt steps, warm-up first (Le & Hua 2021)."""

    def curve(self, done: float) -> float:
        """The original rate at the same share of the original steps."""
        values = self.original.values
        # A share that is k / n in exact arithmetic must not fall below it.
        return float(values[min(int(done * len(values) + 1e-9), len(values) - 1)])


class CLR(RetrainingSchedule):
    """Cyclic restart: warm-up, then a cosine from the peak to 0 (Le & Hua 2021)."""

    def curve(self, done: float) -> float:
        """A half cosine."""
        return self.peak * (1 + math.cos(math.pi * done)) / 2


class LLR(RetrainingSchedule):
    """Linear restart: warm-up, then linear from the peak to 0 (Zimmer et al. 2023)."""

    def curve(self, done: float) -> float:
        """A straight line."""
        return self.peak * (1 - done)


class ALLR(LLR):
    """Adaptive linear restart: LLR from peak * max(d, T_rt / T), at most the peak.

    d = ||W - W_p|| / (||W|| sqrt(s)) measures what pruning removed, s being the share of weights
    removed (Zimmer et al. 2023, section 3); see `relative_distance`. Where T is not known,
    d alone counts.
    """

    def start(self) -> float:
        """The discounted peak."""
        d, length = self.distance, self.original.steps
        if d is None or not 0 <= d < math.inf:
            raise InputError(
                "ALLR needs the relative distance to the dense weights"
                + ("" if d is None else f", and it is {d}"),
                where="distance=",
                remedy="pass depcut.training.relative_distance(dense, plan)",
            )
        least = min(self.steps / length, 1.0) if length else 0.0
        return self.original.top * min(max(d, least), 1.0)


SCHEDULES: dict[str, type[RetrainingSchedule]] = {
    kind.__name__.lower(): kind for kind in (FT, LRW, SLR, CLR, LLR, ALLR)
}


def schedule(
    name: str,
    optimizer: Optimizer,
    original: OriginalSchedule | float,
    steps: int,
    *,
    distance: float | None = None,
) -> RetrainingSchedule:
    """A retraining schedule by name, to be stepped once an iteration.

    Args:
        name: "ft", "lrw", "slr", "clr", "llr" or "allr".
        optimizer: Whose rates it sets.
        original: The original schedule, or its peak rate where no more is needed (CLR, LLR, ALLR).
        steps: T_rt, the number of iterations of retraining.
        distance: Of ALLR: see `depcut.training.relative_distance`.

    Raises:
        InputError: There is no such schedule, or something is missing or out of its range.
    """
    return named(name)(optimizer, original, steps, distance=distance)


def named(name: str) -> type[RetrainingSchedule]:
    """The class of a schedule.

    Raises:
        InputError: There is none of that name.
    """
    text = name.lower() if isinstance(name, str) else ""
    kind = SCHEDULES.get(text)
    if kind is None:
        close = difflib.get_close_matches(text, SCHEDULES, 1, 0.4)
        raise InputError(
            f"there is no schedule {shown(name)}",
            where="schedule=",
            remedy=(f"did you mean {close[0]!r}? " if close else "")
            + f"there are {', '.join(SCHEDULES)}",
        )
    return kind


def _whole(steps: Any, place: str) -> int:
    return check_integer(
        steps, "steps", 1, _MOST, what=f"a schedule of {shown(steps)} steps", where=place
    )
