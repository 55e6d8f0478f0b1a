"""What reads a group of units: weights multiplied with the same inputs, as one reader."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from depcut.axes import Indices
from depcut.calibration.inputs import Inputs
from depcut.calibration.levels import level
from depcut.calibration.products import single_is_kept
from depcut.coupling.groups import Group
from depcut.ops.site import Site
from depcut.scores.elimination import Reads, Weight
from depcut.scores.quadratic import (
    FullGram,
    FullInverse,
    Gram,
    Inverse,
    ThinGram,
    ThinInverse,
    inverted,
)

_DAMPING = 1e-2  # of the mean variance of the inputs
_TINY = 1e-30
_NOISE = 1e-12  # of the energy of what is read: what rounding leaves of a variance
_WIDE = 512  # columns from which on units are eliminated in single precision, see `quadratic`
_BLOCK = 2**21  # numbers of a weight that are held in double precision at a time


@dataclass(frozen=True)
class Gathered:
    """What the data show of sites.

    Attributes:
        inputs: By site, what it reads; the same object where others read the same.
        weights: By site, W (blocks, out, in), in the model's precision.
    """

    inputs: dict[Site, Inputs] = field(default_factory=dict)
    weights: dict[Site, torch.Tensor] = field(default_factory=dict)


def readers(
    sites: list[Site], group: Group, gathered: Gathered, felt: Mapping[fx.Node, torch.Tensor]
) -> list[Reads]:
    """The sites that read a group; those that read the same inputs as one.

    Args:
        sites: The sites.
        group: The group.
        gathered: Moments of what the sites read.
        felt: See `sensitivities`; without a node, an error in what it computes counts as a share of
            its variance.
    """
    together: dict[Hashable, list[Site]] = {}
    placed: dict[Hashable, tuple[NDArray[np.int64], bool]] = {}
    for site in sites:
        owners = site.units(group.axis)
        if site not in gathered.inputs or not (owners >= 0).any():
            continue
        at = _columns(site, group, owners, len(gathered.weights[site]))
        if at is None:
            continue
        key = (gathered.inputs[site], site.takes_shift, at[0].tobytes(), at[1])
        together.setdefault(key, []).append(site)
        placed[key] = at
    return [_reader(alike, gathered, felt, *placed[key]) for key, alike in together.items()]


def _reader(
    sites: list[Site],
    gathered: Gathered,
    felt: Mapping[fx.Node, torch.Tensor],
    columns: NDArray[np.int64],
    blockwise: bool,
) -> Weight:
    """Sites with the same inputs and columns of a group as one reader."""
    inputs, centred = gathered.inputs[sites[0]], sites[0].takes_shift
    square, whole = inputs.squares(centred), inputs.squares(False)
    own = level(square)
    own = own.clamp_min(1e-6 * float(own.max()) + _TINY)
    damping = _DAMPING * own + _NOISE * whole.mean(1)
    scaled = [_Scaled.of(gathered.weights[s], felt.get(s.node), inputs, centred) for s in sites]
    # Constant inputs carry nothing that a bias does not.
    for weight in scaled:
        power = weight.squares()
        if not float((power * square).sum()) > _NOISE * float((power * whole).sum()):
            weight.factor.zero_()
    blocks, _, size = scaled[0].weight.shape
    scale: torch.Tensor | None = None
    if size >= _WIDE and single_is_kept():
        # Of the weights, the largest column's energy; of the inverse, the inverse of the damping.
        energy = torch.stack([w.squares() for w in scaled]).sum(0).amax(1) + _TINY
        for weight in scaled:
            weight.factor.div_(energy.sqrt()[:, None, None])
        scale = (energy * damping)[:, None].cpu()
    kind = torch.float64 if scale is None else torch.float32
    gram: Gram
    if sum(w.weight.shape[1] for w in scaled) < size:
        gram = ThinGram(torch.cat([rows.to(kind) for w in scaled for rows in w.rows()], 1).cpu())
    else:
        total = square.new_zeros(blocks, size, size)
        for rows in (rows for w in scaled for rows in w.rows()):
            total.baddbmm_(rows.transpose(1, 2), rows)
        gram = FullGram(total.to(kind).cpu())
    inverse = _inverse(inputs, centred, damping, lowered=scale is not None)
    return Weight(inverse, gram, size, torch.from_numpy(columns), blocks, blockwise, scale)


def _inverse(inputs: Inputs, centred: bool, damping: torch.Tensor, lowered: bool) -> Inverse:
    """Inverse of the damped second moments; times the damping, in single precision, if lowered."""
    few = inputs.vectors(centred)
    if few is not None:
        return ThinInverse(few.cpu(), damping.cpu(), lowered=lowered)
    damped = inputs.products(centred)
    damped = damped if centred else damped.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    if lowered:
        single = (damped / damping[:, None, None]).float()
        factor, failed = torch.linalg.cholesky_ex(single)
        if not bool(failed.any()):
            return FullInverse(torch.cholesky_inverse(factor).cpu())
    full = inverted(damped)
    if lowered:
        full = full.mul_(damping[:, None, None]).float()
    return FullInverse(full.cpu())


@dataclass(frozen=True)
class _Scaled:
    """A weight whose squared error of the outputs is a share of the loss, in double precision.

    Attributes:
        weight: W, (blocks, out, in).
        factor: Of its rows, (blocks, out, 1).
    """

    weight: torch.Tensor
    factor: torch.Tensor

    @staticmethod
    def of(
        weight: torch.Tensor, felt: torch.Tensor | None, inputs: Inputs, centred: bool
    ) -> _Scaled:
        """By what is felt of its outputs; else, by their energy.

        Args:
            weight: W, (blocks, out, in).
            felt: See `sensitivities`.
            inputs: What it reads.
            centred: Whether a constant can be taken elsewhere.
        """
        one = torch.ones((*weight.shape[:2], 1), dtype=torch.float64, device=weight.device)
        if felt is not None and felt.ndim:
            return _Scaled(weight, (felt.to(one).reshape(one.shape) / inputs.count).sqrt())
        plain = _Scaled(weight, one)
        energy = max(sum(inputs.energy(rows, centred) for rows in plain.rows()), _TINY)
        share: float = max(1.0 if felt is None else float(felt), _TINY)
        return _Scaled(weight, one * (share / energy) ** 0.5)

    def rows(self) -> Iterator[torch.Tensor]:
        """Some rows at a time, (blocks, rows, in)."""
        blocks, out, size = self.weight.shape
        step = max(1, _BLOCK // (blocks * size))
        for start in range(0, out, step):
            end = start + step
            yield self.weight[:, start:end].double() * self.factor[:, start:end]

    def squares(self) -> torch.Tensor:
        """Sums of squares by column, (blocks, in)."""
        blocks, _, size = self.weight.shape
        total = self.factor.new_zeros(blocks, size)
        for rows in self.rows():
            total += rows.square().sum(1)
        return total


def _columns(
    site: Site, group: Group, owners: Indices, blocks: int
) -> tuple[NDArray[np.int64], bool] | None:
    """(rows, units, columns) of a site of each unit, and whether its blocks are the rows.

    None where the rows of the group are neither told apart by columns nor by blocks.
    """
    inside = np.full_like(owners, -1) if group.row_axis is None else site.units(group.row_axis)
    by_column = bool((inside >= 0).any())
    blockwise = group.row_axis is not None and not by_column
    if blockwise and blocks != group.rows:
        return None
    key = np.where(owners >= 0, np.maximum(inside, 0) * group.size + owners, -1)
    order = np.argsort(key, kind="stable")
    columns = order[np.searchsorted(key[order], 0) :]
    if by_column:
        return columns.reshape(group.rows, group.size, -1), False
    return np.tile(columns.reshape(1, group.size, -1), (group.rows, 1, 1)), blockwise
