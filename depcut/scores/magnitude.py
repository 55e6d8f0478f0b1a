"""Data-free criteria: norms of a unit's weights, and random scores."""

from __future__ import annotations

import numpy as np
import torch

from depcut.scores.aggregate import Sums, compared, totals
from depcut.scores.context import Context, Scores, criterion


def powers(context: Context, power: int) -> Sums:
    """Sums of |w|^power.

    Args:
        context: The weights.
        power: 1 or 2.
    """

    def sums(name: str, kept: tuple[int, ...]) -> torch.Tensor:
        tensor = context.weights[name]
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        values = tensor.float() if half else tensor
        others = [d for d in range(values.ndim) if d not in kept]
        if kept == (0,) and others:
            # One pass without a temporary, but slow where the rows are not contiguous.
            norms: torch.Tensor = torch.linalg.vector_norm(values, power, dim=others)
            return norms**power
        elements = values.square() if power == 2 else values.abs()
        left = elements.sum(dim=others) if others else elements
        return left.permute([sorted(kept).index(d) for d in kept])

    return sums


@criterion("magnitude")
@criterion("l2")
def l2(context: Context) -> Scores:
    """Group L2 norm: sqrt of the sum of w^2 over all members, divided by the group's mean.

    Source: Fang et al., DepGraph, CVPR 2023, eq. 5 (group norm); Li et al., ICLR 2017.
    Needs no data.
    """
    return compared(context, [np.sqrt(t) for t in totals(context, powers(context, 2), rows=True)])


@criterion("l1")
def l1(context: Context) -> Scores:
    """Group L1 norm: sum of |w| over all members, divided by the group's mean.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    Needs no data.
    """
    return compared(context, totals(context, powers(context, 1), rows=True))


@criterion("lamp", normalize="none")
def lamp(context: Context) -> Scores:
    """Layer-adaptive magnitude: a unit's share of what is left once all smaller ones are gone.

    With the squared group norms n of a group in ascending order, score(u) = n_u / sum of n_v over
    all v that are not before u. The best unit of every group scores 1, so none is emptied; the
    paper's weights are units here, its layers groups.
    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, eq. 6.
    Needs no data.
    """
    scores = []
    for norms in totals(context, powers(context, 2), rows=True):
        order = np.argsort(norms, axis=-1, kind="stable")
        ascending = np.take_along_axis(norms, order, -1)
        left = np.cumsum(ascending[..., ::-1], axis=-1)[..., ::-1]
        share = np.empty_like(norms)
        shares = np.divide(ascending, left, out=np.ones_like(left), where=left > 0)
        np.put_along_axis(share, order, shares, -1)
        scores.append(share)
    return compared(context, scores)


@criterion("random", aggregate=None, members=None, normalize=None)
def uniform_random(context: Context) -> Scores:
    """Independent uniform draws, the control for other criteria. Needs no data."""
    generator = np.random.default_rng(context.seed)
    return [generator.random(g.size) + 1e-9 for g in context.coupling.groups]
