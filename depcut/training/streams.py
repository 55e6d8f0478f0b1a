"""Random numbers of training, so that a resumed run draws what an uninterrupted one draws.

Every step of the model draws from a seed of its own, and so does every epoch of the data: there is
no state to be carried along, and dropout does not shift the data's augmentation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from depcut.capture.random_state import random_states, restore

DATA, STEP, VALID = 1, 2, 3  # what a seed is for


def seed_everything(*numbers: int) -> None:
    """Seed torch, numpy and random.

    Args:
        *numbers: Non-negative; any difference in them gives unrelated seeds.
    """
    words = [int(w) for w in np.random.SeedSequence(numbers).generate_state(4)]
    torch.manual_seed(words[0] << 32 | words[1])
    random.seed(words[2])
    np.random.seed(words[3])  # noqa: NPY002  (what users' transforms draw from)


def seed_of(*numbers: int) -> int:
    """A single seed, for a generator."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Stream:
    """Random states of their own, beside the current ones.

    Args:
        *numbers: See `seed_everything`.
    """

    def __init__(self, *numbers: int) -> None:
        outside = random_states()
        seed_everything(*numbers)
        self.states = random_states()
        restore(outside)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context, draws are this stream's."""
        outside = random_states()
        restore(self.states)
        try:
            yield
        finally:
            self.states = random_states()
            restore(outside)
