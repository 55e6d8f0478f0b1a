"""How many layers read a group: the residual stream is read by all, an inner width by one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from depcut import axes
from depcut.coupling.groups import Coupling
from depcut.graph.ancestry import Weights


def readers(coupling: Coupling) -> NDArray[np.int64]:
    """Number of activations in which weights read each group, at least 1: [groups].

    Weights that multiply the same activation, as those of queries, keys and values do, or as one
    fused weight does, count once.

    Args:
        coupling: The groups.
    """
    weights = Weights(coupling.program)
    read: list[set[object]] = [set() for _ in coupling.groups]
    for node, effects in coupling.effects.items():
        for place in effects.contracts:
            weight, dim = place
            dims = coupling.env.get(weight)
            if not isinstance(dims, tuple) or not weights.behind(weight):
                continue
            source, _ = effects.counterparts.get(place, (node, 0))
            for leaf in axes.leaves(axes.resolve(dims[dim])):
                group = coupling.group_of.get(leaf)
                if group is not None:
                    read[group.index].add(source)
    return np.array([max(1, len(found)) for found in read], dtype=np.int64)
