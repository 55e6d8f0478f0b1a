"""One kernel of a run of a model, as a runtime's own profile tells it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from depcut.timing.clock import Call

Shape = tuple[int, ...]

WARM = 2  # runs that are not counted
PROFILED = 0.5  # seconds to fill with runs that are
_RUNS = (6, 40)  # at least and at most


@dataclass(frozen=True)
class Kernel:
    """One kernel of a run, after the runtime's fusions.

    Attributes:
        op: Operator that the runtime reports, with a mark where it works in a blocked layout.
        inputs: Shapes of the inputs that hold real numbers; those packed beforehand are missing.
        outputs: Shapes of its outputs.
        seconds: What one run of it takes; a median, or a mean where a runtime tells no more.
    """

    op: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    seconds: float


def runs_to_fill(seconds: float, call: Call) -> int:
    """How many runs fill a time, from what the next one takes, within what a median needs.

    Args:
        seconds: The time.
        call: One run; it is called once.
    """
    started = time.perf_counter()
    call()
    once = time.perf_counter() - started
    return min(max(math.ceil(seconds / max(once, 1e-6)), _RUNS[0]), _RUNS[1])
