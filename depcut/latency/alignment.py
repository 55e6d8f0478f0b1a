"""What widths are to be multiples of, for the kernels of a runtime."""

from __future__ import annotations

from depcut.options import Options
from depcut.timing.runtimes import RUNTIMES, check_known


def alignment(options: Options) -> int:
    """The number that kept widths are multiples of.

    Args:
        options: What was chosen; `align="auto"` is what the kernels of its runtime work in.

    Raises:
        InputError: There is no such runtime.
    """
    check_known(options.runtime)
    if isinstance(options.align, str):
        return RUNTIMES[options.runtime].alignment
    return options.align
