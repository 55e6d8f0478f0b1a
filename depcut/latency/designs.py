"""Which widths to measure: a few that cover the range of every class at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from depcut.allocate.space import Space

_LEAST = 0.15  # of a class's units; narrower layers are extrapolated


def designs(where: Space, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Latin hypercube over the classes: each class's range is cut into as many parts as samples.

    Source: McKay, Beckman, Conover 1979, "A comparison of three methods for selecting values of
    input variables". Because classes vary independently, what a kernel takes can be told apart by
    the two (or more) widths that it depends on.

    Args:
        where: The classes and their steps.
        count: Number of samples, the dense model among them.
        seed: Of the draw.

    Returns:
        Kept counts of every group, [samples, groups]; the dense model first, then a model with the
        smallest widths sampled.
    """
    generator = np.random.default_rng(seed)
    classes, others = len(where.sizes), max(count - 2, 0)
    strata = np.argsort(generator.random((classes, others)), axis=1)
    part = (strata + generator.random((classes, others))) / max(others, 1)
    share = _LEAST + (1 - _LEAST) * part
    share = np.concatenate([np.ones((classes, 1)), np.full((classes, 1), _LEAST), share], axis=1)
    taken = np.rint((1 - share) * (where.sizes / where.steps)[:, None]).astype(np.int64)
    taken = np.minimum(taken, where.available[:, None]).T
    return np.stack([where.kept(row) for row in taken[:count]])


def between(where: Space, rows: NDArray[np.int64], seed: int = 0) -> NDArray[np.int64]:
    """Designs with every width that has a step moved down, to between two multiples of it.

    Args:
        where: The classes and their steps.
        rows: Kept counts of every group, [samples, groups].
        seed: Of the draw.

    Returns:
        Kept counts of every group, [samples, groups].
    """
    generator = np.random.default_rng(seed)
    steps = np.where(where.available > 0, where.steps, 1)
    moved = [1 + generator.integers(0, np.maximum(steps - 1, 1)) for _ in rows]
    less = np.array([np.where(steps > 1, move, 0)[where.class_of] for move in moved])
    floors = np.maximum(where.floors[where.class_of], 1)
    return np.asarray(np.maximum(rows - less, np.minimum(floors, rows)))
