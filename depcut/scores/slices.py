"""A unit's slices of a tensor side by side, for criteria that compare units."""

from __future__ import annotations

import numpy as np
import torch

from depcut import axes
from depcut.axes import Axis, Term


def unit_slices(tensor: torch.Tensor, dim: int, term: Term, axis: Axis) -> torch.Tensor:
    """The units' slices in double precision: (units, indices of a unit, *other dimensions).

    Args:
        tensor: A parameter or an activation.
        dim: Its dimension in which the units lie.
        term: Resolved term of that dimension.
        axis: The group's axis.
    """
    owner = axes.units(term, axis)
    order = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]
    at = torch.from_numpy(order).to(tensor.device)
    lines = tensor.movedim(dim, 0)
    return lines[at].double().reshape(axis.size, -1, *lines.shape[1:])
