"""Data-free criteria: norms of all that a unit owns, and chance."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from depcut import axes
from depcut.axes import Axis
from depcut.coupling import Coupling, Group
from depcut.errors import InputError
from depcut.scores.rows import row_sums


def _norms(coupling: Coupling, model: nn.Module, power: int) -> list[NDArray[np.float64]]:
    """Sum of |w|^power over all members of each unit, row by row where there is an outer axis."""
    program, index = coupling.program, coupling.group_of
    totals = [np.zeros((g.rows, g.size) if g.outer else g.size) for g in coupling.groups]
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, dims in coupling.dims.items():
        if name not in program.parameters or program.aliases.get(name, (name,))[0] != name:
            continue
        free = [i for i, t in enumerate(dims) if any(leaf in index for leaf in axes.leaves(t))]
        tensor = held[name].detach()
        if not free or not tensor.is_floating_point():
            continue
        if tensor.is_meta:
            raise InputError(
                "magnitudes need weights, and these are on the meta device",
                where=name,
                remedy="load the weights, or pass score='random'",
            )
        values = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        once = cache(partial(_summed, values, power))
        by_row: dict[Axis, Group] = {}
        for i in free:
            for leaf, part in axes.project(dims[i], once((i,))):
                group = index.get(leaf)
                if group is not None and group.outer is None:
                    totals[group.index] += part
                elif group is not None:
                    by_row[leaf] = group
        for group in by_row.values():
            totals[group.index] += row_sums(once, dims, group)
    return totals


def _summed(values: torch.Tensor, power: int, kept: tuple[int, ...]) -> NDArray[np.float64]:
    """Sum of |w|^power over all dimensions but one or two."""
    if len(kept) == 1:
        return np.asarray(_sums(values, kept[0], power).double().cpu().numpy())
    powers = values.square() if power == 2 else values.abs()
    others = [j for j in range(values.ndim) if j not in kept]
    sums = powers.sum(dim=others) if others else powers
    return np.asarray((sums if kept[0] < kept[1] else sums.T).double().cpu().numpy())


def _sums(values: torch.Tensor, dim: int, power: int) -> torch.Tensor:
    """Sum of |w|^power over all dimensions but one."""
    others = [j for j in range(values.ndim) if j != dim]
    if dim == 0 and others:
        # One pass without a temporary, but slow where the rows are not contiguous.
        norms: torch.Tensor = torch.linalg.vector_norm(values, power, dim=others)
        return norms**power
    powers = values.square() if power == 2 else values.abs()
    return powers.sum(dim=others) if others else powers


def _normalized(totals: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Divided by the group's mean, so that groups of different size and scale compare."""
    return [t / m if (m := t.mean()) > 0 else np.ones_like(t) for t in totals]


def l2(coupling: Coupling, model: nn.Module, seed: int) -> list[NDArray[np.float64]]:
    """Group L2 norm: sqrt of the sum of squares over all members, divided by the group's mean.

    Source: Fang et al., DepGraph, CVPR 2023, eq. 5 (group norm); Li et al., ICLR 2017.
    """
    return _normalized([np.sqrt(t) for t in _norms(coupling, model, 2)])


def l1(coupling: Coupling, model: nn.Module, seed: int) -> list[NDArray[np.float64]]:
    """Group L1 norm: sum of |w| over all members, divided by the group's mean.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    """
    return _normalized(_norms(coupling, model, 1))


def uniform_random(coupling: Coupling, model: nn.Module, seed: int) -> list[NDArray[np.float64]]:
    """Independent uniform draws: the control that every criterion has to beat."""
    generator = np.random.default_rng(seed)
    return [generator.random(g.size) + 1e-9 for g in coupling.groups]
