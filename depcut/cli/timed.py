"""What is timed on the command line, and where."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from depcut.errors import InputError
from depcut.support.torch_private import pytree
from depcut.timing.bench import check_timing
from depcut.timing.runtimes import RUNTIMES, check_runtime


def timing_of(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `depcut.bench` from the options of `Command.runtime`.

    Args:
        options: The command's.

    Raises:
        InputError: A value is out of its range, or this machine lacks the runtime.
    """
    check_runtime(options.runtime, options.provider)
    sizes = options.batch_size if isinstance(options.batch_size, list) else [options.batch_size]
    given = sizes if any(size is not None for size in sizes) else None
    check_timing(options.threads, options.rounds, 0, given, options.peak_memory)
    return {
        "runtime": options.runtime,
        "provider": options.provider,
        "threads": options.threads,
        "pin": _cpus(options.pin),
        "memory": options.peak_memory,
        "rounds": options.rounds,
    }


def _cpus(text: str | None) -> bool | tuple[int, ...]:
    """The processors that `--pin` names."""
    if text is None or text == "auto":
        return text is not None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise InputError(
            f"cannot read the CPUs {text!r}", where="--pin", remedy='write "auto" or, say, 2,3'
        ) from error


def placed(options: argparse.Namespace, models: Any) -> Any:
    """The models, moved to the GPU if PyTorch is to time them there.

    Args:
        options: The command's.
        models: Models and files, in any container.
    """
    if not RUNTIMES[options.runtime].in_place or options.provider != "cuda":
        return models
    return pytree.tree_map_only(nn.Module, lambda model: model.to("cuda"), models)
