"""Criteria from what weights read on a user's data; no labels, no loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from depcut import axes
from depcut.calibration.activations import Activation, find_activations, shown
from depcut.calibration.sites import find_sites, site_inputs
from depcut.calibration.visits import visits
from depcut.ops.site import Site
from depcut.scores.aggregate import Values, compared, unit_sums
from depcut.scores.context import Context, Scores, criterion
from depcut.scores.magnitude import l2
from depcut.scores.maps import independence, rank
from depcut.scores.slices import unit_slices

_Columns = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@criterion("wanda", needs="data", members=None)
def wanda(context: Context) -> Scores:
    """|W| times the size of what it reads: score(u) = sum over its columns j of |W_j|_1 rms(x_j).

    The paper's |W_ij| |x_j|_2, summed over the consumers' columns of a unit; the norm over all
    vectors is divided by the square root of their number, so that readers at different resolutions
    compare. Groups that no weight reads (head_dim of queries and keys) have their L2 norm instead.
    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
    ICLR 2024, eq. 1. Needs data.
    """

    def columns(w: torch.Tensor, _: torch.Tensor, squares: torch.Tensor, n: int) -> torch.Tensor:
        return w * (squares / n).sqrt()

    return _by_columns(context, lambda w: w.abs().sum(1), columns)


@criterion("flap", needs="data", members=None)
def flap(context: Context) -> Scores:
    """Fluctuation: score(u) = sum over its columns j of the sample variance of x_j times |W_j|_2^2.

    A channel that hardly varies can be replaced by its mean, a bias. The variance is over all
    vectors that the weight multiplies (examples and positions). Groups that no weight reads have
    their L2 norm instead.
    Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models,
    AAAI 2024 (the weighted input feature variance). Needs data.
    """

    def columns(w: torch.Tensor, sums: torch.Tensor, squares: torch.Tensor, n: int) -> torch.Tensor:
        centred = (squares - sums.square() / n).clamp(min=0)
        return w * centred / max(n - 1, 1)

    return _by_columns(context, lambda w: w.square().sum(1), columns)


def _by_columns(
    context: Context, norm: Callable[[torch.Tensor], torch.Tensor], columns: _Columns
) -> Scores:
    """Sums over each unit's columns, aggregated over the sites that read the unit.

    Args:
        context: What to score.
        norm: Of the columns of a weight (blocks, out, in).
        columns: Values (blocks, in) from such norms, sums of the inputs and of their squares, and
            the number of vectors.
    """
    coupling = context.coupling
    sites: dict[fx.Node, list[Site]] = {}
    for site in find_sites(coupling):
        sites.setdefault(site.node, []).append(site)
    norms: dict[Site, torch.Tensor] = {}
    sums: dict[Site, tuple[torch.Tensor, torch.Tensor, int]] = {}
    with closing(visits(coupling, context.model, context.data, sites, "activations")) as found:
        for batch, node, call in found:
            for site in sites[node]:
                x = site_inputs(site, call, context.data.batches[batch].valid).double()
                if site not in norms:
                    norms[site] = norm(site.family.matrix(call).double())
                one, two, count = sums.get(site, (0.0, 0.0, 0))
                sums[site] = (one + x.sum(1), two + x.square().sum(1), count + x.shape[1])
    sums = {site: _summed(context, site, *found) for site, found in sums.items()}
    parts: list[list[Values]] = [[] for _ in coupling.groups]
    for site, (one, two, count) in sums.items():
        values = columns(norms[site], one, two, count).cpu().numpy()
        for number, part in _onto_groups(context, site, values).items():
            parts[number].append(part)
    return _or_norm(context, parts)


def _summed(
    context: Context, site: Site, one: torch.Tensor, two: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sums over the batches of all processes."""
    numbers = torch.tensor(count)
    one, two, numbers = context.data.everyone.summed(f"inputs of {site.name}", [one, two, numbers])
    return one, two, int(numbers)


def _onto_groups(context: Context, site: Site, values: Values) -> dict[int, Values]:
    """Values (blocks, columns) by group number: units are columns, or the blocks of a convolution.

    A group that occurs twice in the columns gets both.
    """
    index, by_group = context.coupling.group_of, dict[int, Values]()
    blocks = len(values)
    each = np.repeat(values.sum(1), site.rows.size // blocks) * blocks / site.rows.size
    rows = [
        (axis, part) for axis, part in unit_sums(site.rows, each) if _is_block(site, blocks, axis)
    ]
    for axis, part in (*unit_sums(site.term, values.sum(0)), *rows):
        if axis in index:
            number = index[axis].index
            by_group[number] = by_group[number] + part if number in by_group else part
    return by_group


def _is_block(site: Site, blocks: int, axis: axes.Axis) -> bool:
    """Whether all rows of a block belong to one unit of an axis, which the block thus reads."""
    if blocks == 1:
        return False
    units = axes.units(site.rows, axis).reshape(blocks, -1)
    return bool((units == units[:, :1]).all())


def _or_norm(context: Context, by_group: list[list[Values]]) -> Scores:
    """Parts of each group aggregated and normalised; the L2 norm for groups without any."""
    scores = [
        _aggregated(context, parts) if parts else np.zeros(g.size)
        for g, parts in zip(context.coupling.groups, by_group, strict=True)
    ]
    scores = compared(context, scores)
    if all(by_group):
        return scores
    norms = l2(replace(context, score=replace(context.score, aggregate="sum", members="all")))
    return [s if parts else n for s, n, parts in zip(scores, norms, by_group, strict=True)]


def _aggregated(context: Context, parts: list[Values]) -> Values:
    stacked, how = np.stack(parts), context.score.aggregate
    if how == "max":
        return np.asarray(stacked.max(axis=0))
    return np.asarray(stacked.sum(axis=0) if how == "sum" else stacked.mean(axis=0))


@criterion("apoz", needs="data", aggregate="mean", members=None)
def apoz(context: Context) -> Scores:
    """Share of activations that are not zero: score(u) = 1 - APoZ(u), where the unit is read.

    Source: Hu et al., Network Trimming, 2016 (arXiv 1607.03250), eq. 1. Needs data; says something
    only where activations are exactly zero, as after a ReLU.
    """

    def nonzero(slices: torch.Tensor, _: float) -> torch.Tensor:
        return (slices != 0).double().flatten(1).mean(1)

    return _by_activations(context, nonzero)


@criterion("hrank", needs="data", aggregate="mean", members=None)
def hrank(context: Context) -> Scores:
    """Mean rank of a unit's feature maps where it is read, over examples and batches.

    A map is a matrix: height x width of a channel of an image (any further positions flattened);
    of a unit that is several features of a sequence (a head) tokens x features, a matrix for each
    example; of a unit that is one feature of a sequence, examples x tokens, one for each batch;
    without positions examples x features. Dimension 0 counts as examples. Singular values below
    the precision of the activations count as zero.
    Of sequences nearly all maps have full rank, so that most units tie.
    Source: Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020, eq. 5.
    Needs data.
    """
    return _by_activations(context, rank)


@criterion("chip", needs="data", aggregate="mean", members=None)
def chip(context: Context) -> Scores:
    """Channel independence: what the nuclear norm of all maps loses when the unit's are zero.

    score(u) = |A|_* - |A without the rows of u|_*, A being (channels, positions) of one example
    where the unit is read, averaged over examples and batches; without positions A is (channels,
    examples) of a batch. Dimension 0 counts as examples, of which at most four a batch are taken,
    evenly: every unit of each costs an eigenproblem.
    Source: Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks,
    NeurIPS 2021, eq. 3. Needs data.
    """
    return _by_activations(context, independence)


def _by_activations(
    context: Context, statistic: Callable[[torch.Tensor, float], torch.Tensor]
) -> Scores:
    """Mean over the batches of a statistic of (units, indices, examples, *positions)."""
    coupling = context.coupling
    activations = find_activations(coupling)
    sums: dict[tuple[Activation, int], Values] = {}
    with closing(shown(coupling, context.model, context.data, activations, "activations")) as found:
        for activation, value in found:
            dims = coupling.env[activation.source]
            assert isinstance(dims, tuple)
            term = axes.resolve(dims[activation.dim])
            # A dimension 0 that holds the units leaves one example.
            maps = value if activation.dim else value[:, None]
            precision = torch.finfo(value.dtype).eps
            for number in sorted(activation.groups):
                slices = unit_slices(maps, activation.dim, term, coupling.groups[number].axis)
                part = statistic(slices, precision).cpu().numpy()
                key = (activation, number)
                sums[key] = sums[key] + part if key in sums else part
    parts: list[list[Values]] = [[] for _ in coupling.groups]
    totals = [torch.from_numpy(np.asarray(total)) for total in sums.values()]
    totals = context.data.everyone.summed("activations", totals)
    for (_, number), total in zip(sums, totals, strict=True):
        parts[number].append(total.numpy() / context.data.total)
    return _or_norm(context, parts)
