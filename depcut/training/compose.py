"""Plans made one after the other as one plan for the dense model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from depcut import axes
from depcut.analysis import Analysis
from depcut.axes import Indices
from depcut.coupling import Coupling
from depcut.errors import PlanError
from depcut.plan import Plan, make_plan

TensorIndices = Mapping[str, tuple[Indices | None, ...]]


def composed(dense: Analysis, steps: list[TensorIndices], settings: Mapping[str, object]) -> Plan:
    """The plan for the dense model that keeps what all steps keep.

    Groups are matched by the tensors that they occur in, not by name: a narrowed model may have
    fewer groups.

    Args:
        dense: The dense model's analysis.
        steps: Kept indices of each step, `Plan.tensor_indices`, relative to the model before it.
        settings: What the plan records.

    Raises:
        PlanError: No plan for the dense model keeps just that.
    """
    coupling = dense.coupling
    kept: dict[str, tuple[Indices, ...]] = {
        name: tuple(np.arange(t.size) for t in map(axes.resolve, dims))
        for name, dims in coupling.dims.items()
        if name not in coupling.program.anonymous
    }
    for step in steps:
        kept = {name: _after(now, step.get(name)) for name, now in kept.items()}
    units = {}
    for group in coupling.groups:
        member = group.members[0]
        term = coupling.dims[member.tensor][member.dim]
        owner = axes.units(term, group.axis)[kept[member.tensor][member.dim]]
        units[group.name] = np.unique(owner[owner >= 0])
    plan = make_plan(coupling, dense.model, units, settings)
    _check(plan, kept, coupling)
    return plan


def _after(
    now: tuple[Indices, ...], step: tuple[Indices | None, ...] | None
) -> tuple[Indices, ...]:
    if step is None:
        return now
    return tuple(n if s is None else n[s] for n, s in zip(now, step, strict=True))


def _check(plan: Plan, kept: Mapping[str, tuple[Indices, ...]], coupling: Coupling) -> None:
    indices = plan.tensor_indices()
    for name, wanted in kept.items():
        for dim, (want, have) in enumerate(zip(wanted, indices[name], strict=True)):
            size = axes.resolve(coupling.dims[name][dim]).size
            if not np.array_equal(want, np.arange(size) if have is None else have):
                raise PlanError(
                    "the steps together keep what no plan for the dense model can",
                    where=f"{name}, dimension {dim}",
                    remedy="apply the plans of the steps one after the other; please report this",
                )
