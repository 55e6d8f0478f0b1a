"""Criteria from the distances between a unit's weights and those of the others of its group."""

from __future__ import annotations

import torch

from depcut.scores.aggregate import compared, members
from depcut.scores.context import Context, Scores, criterion
from depcut.scores.slices import unit_slices

_ENTRIES = 1 << 24  # of a block of distances, 128 MiB in double precision


@criterion("fpgm", members="producers")
def fpgm(context: Context) -> Scores:
    """Sum of a unit's distances to all others: score(u) = sum over v of |x_u - x_v|.

    x_u is everything that the unit owns of the members, as one vector; units close to the geometric
    median of their group are replaceable. By default of the producers, as in the paper. Of several
    members the squared distances are aggregated ("sum": that of the joint vector).
    A unit that resembles others may carry most of the signal; the paper retrains afterwards.
    Source: He et al., Filter Pruning via Geometric Median (FPGM), CVPR 2019, eq. 4.
    Needs no data.
    """
    coupling = context.coupling
    places: dict[int, list[tuple[str, int]]] = {}
    for place, groups in members(context).items():
        for index in groups:
            places.setdefault(index, []).append(place)
    scores = []
    for group in coupling.groups:
        mine = places.get(group.index, [])
        total = torch.zeros(group.size, dtype=torch.float64)
        step = max(1, _ENTRIES // group.size)
        for start in range(0, group.size, step):
            squares: list[torch.Tensor] = []
            for name, dim in mine:
                term = coupling.dims[name][dim]
                rows = unit_slices(context.weights[name], dim, term, group.axis).flatten(1)
                distances = torch.cdist(rows[start : start + step], rows).square_()
                if not squares:
                    squares.append(distances)
                elif context.score.aggregate == "max":
                    torch.maximum(squares[0], distances, out=squares[0])
                else:
                    squares[0] += distances
            count = len(mine) if context.score.aggregate == "mean" else 1
            total[start : start + step] = (squares[0] / count).sqrt_().sum(dim=1).cpu()
        scores.append(total.numpy())
    return compared(context, scores)
