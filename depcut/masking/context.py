"""A plan on the dense model: zeros in its parameters for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from depcut.errors import PlanError, listed
from depcut.masking.masks import Masks
from depcut.masking.places import Places, find_places
from depcut.masking.probe import Trial, probed
from depcut.plan.keep import Keep


@contextmanager
def masked(keep: Keep, model: nn.Module) -> Iterator[None]:
    """Within the context, the model computes what the smaller one would.

    Args:
        keep: What stays.
        model: The analysed model; its parameters have zeros until the context ends.

    Raises:
        PlanError: No zeros compute what the smaller model does; names the groups.
    """
    places = find_places(keep.coupling)
    _refuse_what_no_zeros_express(keep, model, places)
    masks = Masks(model, places.zeros, keep.coupling.program.aliases)
    try:
        masks.set(keep)
        yield
    finally:
        masks.clear()


def _refuse_what_no_zeros_express(keep: Keep, model: nn.Module, places: Places) -> None:
    """By the operators' rules, and then by a trial with the very units of the plan."""
    if keep.units.keys() <= places.zeros.keys():
        if Trial(keep.coupling, model, places).holds(keep):
            return
        places = probed(keep.coupling, model, places)
    groups = keep.coupling.groups
    named = {groups[n].name: why for n, why in sorted(places.excluded.items()) if n in keep.units}
    if not named:
        raise PlanError(
            "zeros do not compute what the smaller model does, though those of each group do"
            + (": a dropped branch adds something else than zero" if keep.bypass else ""),
            where=type(model).__name__,
            remedy="apply the plan, and judge what comes out",
        )
    raise PlanError(
        "no zeros compute what the smaller model does: "
        + listed([f"{name} ({why})" for name, why in named.items()], 3),
        where=type(model).__name__,
        remedy="apply the plan, and judge what comes out; or plan with ignore=[...] for them",
    )
