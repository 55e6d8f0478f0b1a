"""A unit's slice of a tensor as a row of a matrix, for criteria that compare units."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from depcut.axes import Axis, Indices, Product, Term


def places(term: Term, axis: Axis) -> Iterator[Indices]:
    """Where an axis occurs in a resolved term: per occurrence the indices (units, indices each).

    Args:
        term: A resolved term.
        axis: An axis; nothing is yielded if the term does not hold it.
    """
    if isinstance(term, Axis):
        if term is axis:
            yield np.arange(term.size, dtype=np.int64)[:, None]
        return
    if isinstance(term, Product):
        stride = term.size
        for factor in term.factors:
            outer, stride = term.size // stride, stride // factor.size
            before = np.arange(outer, dtype=np.int64)[:, None] * (factor.size * stride)
            for found in places(factor, axis):
                rows = found[:, None, :, None] * stride
                after = np.arange(stride, dtype=np.int64)
                yield (rows + before[None, :, :, None] + after).reshape(len(found), -1)
        return
    start = 0
    for part in term.parts:
        for found in places(part, axis):
            yield found + start
        start += part.size


def unit_rows(tensor: torch.Tensor, dim: int, term: Term, axis: Axis) -> torch.Tensor:
    """The matrix (units, features) of the units' slices of a tensor, in double precision.

    Args:
        tensor: A parameter.
        dim: Its dimension in which the units lie.
        term: Resolved term of that dimension.
        axis: The group's axis.
    """
    lines = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
    parts = []
    for found in places(term, axis):
        at = torch.from_numpy(found.reshape(-1)).to(tensor.device)
        parts.append(lines[at].reshape(axis.size, -1))
    return torch.cat(parts, dim=1).double()
