"""What one run of a PyTorch model spends its time on, operator by operator."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from depcut.errors import LatencyError
from depcut.support.torch_private import TorchDispatchMode, pytree
from depcut.timing.clock import Call
from depcut.timing.kernels import PROFILED, WARM, Kernel, Shape, runs_to_fill


def operators(call: Call, where: str, seconds: float = PROFILED) -> tuple[Kernel, ...]:
    """Time every operator that a run of a model on the CPU executes.

    Args:
        call: One run of the model, without gradients.
        where: What is run, for messages.
        seconds: Time to fill with runs.

    Returns:
        The operators in the order in which they run, each with its median time.

    Raises:
        LatencyError: The operators change from run to run.
    """
    rounds: list[list[_Executed]] = []

    def run() -> None:
        with _Clock() as clock:
            call()
        rounds.append(clock.executed)

    runs = runs_to_fill(seconds, run)
    for _ in range(runs + WARM - 1):
        run()
    names = [[one.described for one in executed] for executed in rounds]
    if not names[0] or any(one != names[0] for one in names[1:]):
        raise LatencyError(
            "the model does not run the same operators on the same sizes in every run",
            where=where,
            remedy="its code draws or counts; shrink by of='macs' instead",
        )
    return tuple(
        Kernel(*names[0][place], seconds=median(one.seconds for one in times))
        for place, times in enumerate(zip(*rounds[WARM:], strict=True))
    )


@dataclass(frozen=True)
class _Executed:
    """One operator of one run: its name, the shapes of what it read and wrote, and its time."""

    described: tuple[str, tuple[Shape, ...], tuple[Shape, ...]]
    seconds: float


class _Clock(TorchDispatchMode):
    """Times what is executed while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.executed: list[_Executed] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note what it took."""
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - started
        shapes = _shapes((args, kwargs)), _shapes(result)
        self.executed.append(_Executed((str(func), *shapes), seconds))
        return result


def _shapes(values: Any) -> tuple[Shape, ...]:
    """Shapes of the tensors of real numbers among some values."""
    return tuple(
        tuple(leaf.shape)
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
