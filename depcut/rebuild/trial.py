"""A way to shrink, carried out alone: whether the class as it is built computes the same."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from torch import nn

from depcut.coupling.groups import Coupling
from depcut.errors import VerificationError
from depcut.plan.attributes import solve
from depcut.plan.keep import Keep
from depcut.rebuild.builder import Builder
from depcut.rebuild.moves import Move
from depcut.rebuild.same_graph import other_code, valueless
from depcut.rebuild.stock import rebuilt
from depcut.rebuild.twin import Twin
from depcut.verify.calls import verify_calls


def trial(coupling: Coupling, model: nn.Module, builder: Builder, move: Move) -> str | None:
    """Carry a move out alone, by half, and compare by value; of weights without, the graphs.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.
        builder: Of its class.
        move: What shrinks.

    Returns:
        What is wrong with it, None if nothing is.
    """
    share = Fraction(max(1, move.tie.steps // 2), move.tie.steps)
    values = builder.scaled(move.factors(share))
    twin = builder.twin(values) if values else None
    if twin is None:
        return "the class cannot be built with half of it"
    generator = np.random.default_rng(0)
    units = {}
    for i in move.tie.groups:
        size = coupling.groups[i].size
        units[i] = np.sort(generator.permutation(size)[: int(size * share)])
    keep = Keep(coupling, units)
    try:
        slim = rebuilt(model, keep, builder.dense, twin)
        why = _foreseen(keep, model, twin)
        if why is None:
            verify_calls(slim, model)
        if why is None and valueless(model):
            why = other_code(keep, twin.model)
    except VerificationError as error:
        return error.what + (f" [{error.where}]" if error.where else "")
    return why


def _foreseen(keep: Keep, model: nn.Module, twin: Twin) -> str | None:
    """What would be wrong by the numbers in the class's code, before anything runs."""
    for node in keep.coupling.effects:
        for name in keep.pins(node):
            return f"the implicit {name} of attention changes with it"
    for (name, path), value in solve(keep, model).values.items():
        built = twin.attributes.get(name, {}).get(path)
        if built is not None and built != value:
            return f"{name}.{path[0]} is {built} where {value} is needed"
    return None
