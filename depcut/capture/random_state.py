"""The caller's random states: read, restored, preserved by a context."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

States = tuple[Any, ...]


def random_states() -> States:
    """The states that torch (the CPU), random and numpy draw from."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def restore(states: States) -> None:
    """Set the generators to states that `random_states` returned."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


def python_states() -> States:
    """The states that random and numpy draw from."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def same_states(before: States, after: States) -> bool:
    """Whether two results of `python_states` are equal: whether nobody drew in between."""
    return before[0] == after[0] and all(map(np.array_equal, before[1], after[1]))


def restore_python(states: States) -> None:
    """Set the generators of random and numpy to states that `python_states` returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def preserved() -> Iterator[None]:
    """The caller's random states, those of GPUs among them, are as before afterwards.

    What nobody drew from is left alone, so that draws of another thread are not repeated.
    """
    before, devices = random_states(), _device_states()
    try:
        yield
    finally:
        after = random_states()
        if not torch.equal(before[0], after[0]):
            torch.set_rng_state(before[0])
        if before[1] != after[1]:
            random.setstate(before[1])
        if any(not np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True)):
            np.random.set_state(before[2])  # noqa: NPY002
        for index, (old, new) in enumerate(zip(devices, _device_states(), strict=False)):
            if not torch.equal(old, new):
                torch.cuda.set_rng_state(old, index)


def _device_states() -> list[torch.Tensor]:
    return list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else []
