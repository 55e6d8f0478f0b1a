"""Plans made one after the other as one plan for the dense model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from depcut import axes
from depcut.analysis import Analysis
from depcut.apply.plan import Plan, planned
from depcut.axes import Indices
from depcut.axes.rows import broadcastable
from depcut.coupling.groups import Coupling, Group
from depcut.errors import PlanError

TensorIndices = Mapping[str, tuple[Indices | None, ...]]

# Of one tensor: for each dimension the dense index of what is there now, an array of the tensor's
# rank, of size 1 along the dimensions that make no difference.
Origins = tuple[Indices, ...]


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
    kept = {
        name: _open(tuple(t.size for t in map(axes.resolve, dims)), (None,) * len(dims))
        for name, dims in coupling.dims.items()
        if name not in coupling.program.anonymous
    }
    for step in steps:
        kept = {name: _after(now, step.get(name)) for name, now in kept.items()}
    units = {group.name: _units(group, kept, coupling) for group in coupling.groups}
    plan = planned(coupling, dense.model, units, settings)
    _check(plan, kept, coupling)
    return plan


def _open(sizes: tuple[int, ...], step: tuple[Indices | None, ...]) -> Origins:
    """Kept indices of each dimension, as arrays of the tensor's rank that broadcast."""
    pairs = enumerate(zip(sizes, step, strict=True))
    return tuple(broadcastable(kept, size, dim, len(sizes)) for dim, (size, kept) in pairs)


def _after(now: Origins, step: tuple[Indices | None, ...] | None) -> Origins:
    """Dense indices of what a step leaves of what was there before it."""
    if step is None or all(s is None for s in step):
        return now
    sizes = tuple(n.shape[dim] for dim, n in enumerate(now))
    at = _open(sizes, step)
    return tuple(
        n[tuple(a if size > 1 else 0 for a, size in zip(at, n.shape, strict=True))]
        if max(n.shape) > 1
        else n
        for n in now
    )


def _units(group: Group, kept: Mapping[str, Origins], coupling: Coupling) -> Indices:
    """Kept units of a group, [kept], or [rows, kept] where it chooses row by row."""
    rows = 1 if group.row_axis is None else group.rows
    for member in group.members:
        dims = tuple(map(axes.resolve, coupling.dims[member.tensor]))
        owners = _owners(dims, kept[member.tensor], group.axis, member.dim)
        outer = np.zeros(1, dtype=np.int64)
        if group.row_axis is not None:
            at = next((d for d, t in enumerate(dims) if group.row_axis in axes.leaves(t)), None)
            if at is None:
                continue
            outer = _owners(dims, kept[member.tensor], group.row_axis, at)
        owners, outer = np.broadcast_arrays(owners, outer)
        inside = (owners >= 0) & (outer >= 0)
        flags = np.zeros((rows, group.size), dtype=bool)
        flags[outer[inside], owners[inside]] = True
        return _listed(flags)
    raise _impossible(f"group {group.name!r}")


def _owners(dims: tuple[axes.Term, ...], now: Origins, axis: axes.Axis, dim: int) -> Indices:
    """The index of an axis at every place of a tensor."""
    return np.asarray(axes.units(dims[dim], axis)[now[dim]])


def _listed(flags: NDArray[np.bool_]) -> Indices:
    """Kept units, [kept] or [rows, kept]; of a row that is gone, the first ones as fillers."""
    counts = flags.sum(1)
    count = int(counts.max())
    flags[counts == 0, :count] = True
    if (flags == flags[0]).all():
        return np.flatnonzero(flags[0])
    if (flags.sum(1) != count).any():
        raise _impossible("rows of unequal lengths")
    return np.nonzero(flags)[1].reshape(len(flags), count)


def _check(plan: Plan, kept: Mapping[str, Origins], coupling: Coupling) -> None:
    indices = plan.tensor_indices()
    for name, wanted in kept.items():
        sizes = tuple(axes.resolve(t).size for t in coupling.dims[name])
        for dim, (want, have) in enumerate(zip(wanted, _open(sizes, indices[name]), strict=True)):
            if want.shape[dim] != have.shape[dim] or not _agree(want, have):
                raise _impossible(f"{name}, dimension {dim}")


def _agree(a: Indices, b: Indices) -> bool:
    try:
        return bool(np.equal(a, b).all())
    except ValueError:  # of other shapes
        return False


def _impossible(place: str) -> PlanError:
    return PlanError(
        "the steps together keep what no plan for the dense model can",
        where=place,
        remedy="apply the plans of the steps one after the other; please report this",
    )
