"""What the layers that read a unit lose with it, after the best repair: optimal brain surgery."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from string import ascii_letters
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from depcut import axes
from depcut.calibration.sensitivity import sensitivities
from depcut.calibration.site import Call, Site
from depcut.calibration.sites import find_sites, parameters_behind
from depcut.calibration.visits import visits
from depcut.coupling import Coupling, Group
from depcut.scores.aggregate import totals
from depcut.scores.context import Context, Score, Scores
from depcut.scores.magnitude import powers

_DAMPING = 1e-2  # of the mean variance of the inputs
_ROUNDS = 64  # in which the units of a group are eliminated, at most
_TINY = 1e-30
_NOISE = 1e-12  # of the energy of what is read: what rounding leaves of a variance
_SPARSE = 1 / 8  # of the columns, which are dropped when so many are gone
_MATRIX = 2
_PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")


def obs(context: Context) -> Scores:
    """Loss of reconstruction when units go one after the other, the rest re-solved each time.

    For a weight W (out, in) that reads inputs of covariance H, removing the columns S and
    re-solving the others costs tr(W_S ((H^-1)_SS)^-1 W_S^T); W and H^-1 are then updated for the
    next removal. Rows of W are weighted by how much the model's outputs feel an error in them
    (`sensitivities`), so that losses of all layers are shares of the outputs' variance and add up.
    A product of two activations that sums over the units (head_dim of queries and keys) adds the
    energy of their terms in it, as nothing there can be re-solved. The cheapest units go first; a
    unit's score is the loss that its removal added. Units that neither reads have their share of
    the group's squared weights.

    Source: Kurtic et al., ZipLM, NeurIPS 2023, eq. 3-5; Hassibi & Stork, NeurIPS 1992 (second-order
    removal); Martens & Grosse, K-FAC, ICML 2015 (rows weighted by squared derivatives). Needs data.
    """
    coupling = context.coupling
    sites, products = find_sites(coupling), _products(coupling)
    gathered = _gather(context, sites, products)
    felt = sensitivities(
        coupling,
        context.model,
        context.data,
        {**dict.fromkeys(p.node for p in products), **{s.node: s.family.result for s in sites}},
    )
    plain = _shares(context)
    out = []
    for group in coupling.groups:
        found = [_reader(s, group, gathered, felt.get(s.node)) for s in sites]
        readers: list[_Reads] = [r for r in found if r is not None]
        readers += [
            _Terms.of(gathered.products[p], float(felt.get(p.node, torch.ones(())).sum()))
            for p in products
            if p.holds(group)
        ]
        out.append(_eliminated(readers, group.size) if readers else plain[group.index])
    return out


def _shares(context: Context) -> Scores:
    """Each unit's share of the sum of squares over all members of its group."""
    plain = replace(context, score=Score("l2", aggregate="sum", members="all"))
    found = totals(plain, powers(plain, 2))
    return [t / s if (s := float(t.sum())) > 0 else np.full_like(t, 1 / len(t)) for t in found]


@dataclass(frozen=True, eq=False)
class _Product:
    """A node that sums over an axis of two activations.

    Attributes:
        node: The node.
        places: (argument, dimension) of either activation.
        term: The summed dimension.
    """

    node: fx.Node
    places: tuple[tuple[fx.Node, int], tuple[fx.Node, int]]
    term: axes.Term

    def holds(self, group: Group) -> bool:
        return self.term is group.axis


def _products(coupling: Coupling) -> list[_Product]:
    """Products of two activations that sum over nothing but one axis."""
    out = []
    for node, effects in coupling.effects.items():
        if len(effects.contracts) != 2 or node.graph is not coupling.program.graph.graph:
            continue
        first, second = effects.contracts
        dims = coupling.env[first[0]]
        term = axes.resolve(dims[first[1]]) if isinstance(dims, tuple) else None
        computed = not any(parameters_behind(n, coupling.program) for n, _ in effects.contracts)
        two = first[0] is not second[0] and len(node.all_input_nodes) >= 2
        if computed and two and isinstance(term, axes.Axis) and _named(node) in _PRODUCTS:
            out.append(_Product(node, (first, second), term))
    return out


def _named(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


@dataclass
class _Gathered:
    """What one pass over the data collects.

    Attributes:
        inputs: By site, sum of x x^T (blocks, in, in), sum of x (blocks, in), count.
        weights: By site, W (blocks, out, in).
        products: By product, the Gram matrix of its terms (units, units).
    """

    inputs: dict[Site, tuple[torch.Tensor, torch.Tensor, int]]
    weights: dict[Site, torch.Tensor]
    products: dict[_Product, NDArray[np.float64]]


def _gather(context: Context, sites: list[Site], products: list[_Product]) -> _Gathered:
    coupling = context.coupling
    found = _Gathered({}, {}, {})
    free = set(coupling.group_of)
    needed = [s for s in sites if any(leaf in free for leaf in axes.leaves(s.term))]
    wanted = [p for p in products if p.term in free]
    at: dict[fx.Node, list[Site | _Product]] = {}
    items: list[Site | _Product] = [*needed, *wanted]
    for item in items:
        at.setdefault(item.node, []).append(item)
    for _, node, call in visits(coupling, context.model, context.data, list(at), "second moments"):
        for item in at[node]:
            if isinstance(item, Site):
                _add_inputs(found, item, call)
            else:
                _add_terms(found, item, call)
    return found


def _add_inputs(found: _Gathered, site: Site, call: Call) -> None:
    x = site.family.inputs(call).double()
    xx, total, count = x.transpose(1, 2) @ x, x.sum(1), x.shape[1]
    if site in found.inputs:
        before = found.inputs[site]
        xx, total, count = before[0].add_(xx), before[1].add_(total), before[2] + count
    else:
        found.weights[site] = site.family.matrix(call).detach().double()
    found.inputs[site] = xx, total, count


def _add_terms(found: _Gathered, product: _Product, call: Call) -> None:
    """Gram matrix of the rank-one terms a_d b_d^T of a product: (A^T A) * (B^T B) by element."""
    squares = [_squares(product, call, which) for which in (0, 1)]
    a, b = squares
    if a.ndim == b.ndim and a.ndim > _MATRIX and a.shape[-3] != b.shape[-3]:
        # Grouped queries: every key belongs to several of them.
        heads = max(a.shape[-3], b.shape[-3])
        a, b = (v.repeat_interleave(heads // v.shape[-3], -3) for v in (a, b))
    both = a * b
    gram = both.reshape(-1, *both.shape[-2:]).sum(0).cpu().numpy()
    found.products[product] = found.products.get(product, 0.0) + gram


def _squares(product: _Product, call: Call, which: int) -> torch.Tensor:
    """A^T A over all that only one of the two activations has, (batch..., units, units)."""
    source, dim = product.places[which]
    given: Any = {**dict(zip(call, product.node.args, strict=False)), **product.node.kwargs}
    name = next(n for n, v in given.items() if v is source or _lists(v, source))
    if given[name] is source:
        x = call[name].movedim(dim, -1).double()
        x = x if x.ndim > 1 else x[None]
        return x.transpose(-1, -2) @ x  # type: ignore[no-any-return]
    at = list(given[name]).index(source)
    labels = call["equation"].replace(" ", "").partition("->")[0].split(",")
    own, other, unit = labels[at], labels[1 - at], labels[at][dim]
    batch = "".join(c for c in own if c in other and c != unit)
    twin = next(c for c in ascii_letters if c not in call["equation"])
    x = call[name][at].double()
    return torch.einsum(f"{own},{own.replace(unit, twin)}->{batch}{unit}{twin}", x, x)


def _lists(value: object, source: fx.Node) -> bool:
    return isinstance(value, list | tuple) and any(v is source for v in value)


class _Reads(Protocol):
    """What reads a group, for the units that are left."""

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs."""

    def remove(self, units: torch.Tensor) -> float:
        """Remove units together; the cost."""


@dataclass
class _Terms:
    """A product of two activations that sums over a group.

    Attributes:
        gram: Inner products of its terms, (units, units).
        extra: What the terms that are gone already add to the cost of each unit.
    """

    gram: torch.Tensor
    extra: torch.Tensor

    @staticmethod
    def of(gram: NDArray[np.float64], scale: float) -> _Terms:
        """Of the inner products of its terms; all together cost `scale`."""
        # Terms may cancel to nothing; their own energy then sets the scale.
        energy = max(float(gram.sum()), 1e-6 * float(gram.trace()), _TINY)
        matrix = torch.from_numpy(gram * (scale / energy))
        return _Terms(matrix, torch.zeros(len(matrix), dtype=matrix.dtype))

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs."""
        return self.gram.diagonal() + 2 * self.extra

    def remove(self, units: torch.Tensor) -> float:
        """Remove units together; the cost."""
        cost = float(self.gram[units][:, units].sum() + 2 * self.extra[units].sum())
        stay = torch.ones(len(self.gram), dtype=torch.bool)
        stay[units] = False
        self.extra = (self.extra + self.gram[units].sum(0))[stay]
        self.gram = self.gram[stay][:, stay]
        return cost


@dataclass
class _Reader:
    """One weight that reads a group, for the units that are left.

    Attributes:
        inverse: Inverse of the damped covariance of its inputs, (blocks, in, in); written to.
        gram: W^T W over the outputs, (blocks, in, in); written to.
        columns: Columns of each unit, (units, columns of a unit).
        gone: Columns that went and still take part as zeros.
    """

    inverse: torch.Tensor
    gram: torch.Tensor
    columns: torch.Tensor
    gone: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs."""
        rows, cols = self.columns[:, :, None], self.columns[:, None, :]
        return _trace(self.inverse[:, rows, cols], self.gram[:, rows, cols]).sum(0)

    def remove(self, units: torch.Tensor) -> float:
        """Remove units together and re-solve what is left; the cost."""
        gone = self.columns[units].flatten()
        self.gone = torch.cat([self.gone, gone])
        inverse, gram = self.inverse, self.gram
        within = inverse[:, gone[:, None], gone]
        square = gram[:, gone[:, None], gone]
        cost = float(_trace(within, square).sum())
        # With T = (H^-1)_SS^-1 (H^-1)_S: the new gram is (I - E T)^T G (I - E T), E picks S.
        across = inverse[:, gone]
        through = torch.linalg.solve(within, across)
        turned = through.transpose(1, 2)
        half = gram[:, :, gone] - 0.5 * turned @ square
        inverse.baddbmm_(across.transpose(1, 2), through, alpha=-1)
        gram.baddbmm_(half, through, alpha=-1).baddbmm_(turned, half.transpose(1, 2), alpha=-1)
        stay = torch.ones(len(self.columns), dtype=torch.bool)
        stay[units] = False
        self.columns = self.columns[stay]
        if len(self.gone) >= _SPARSE * inverse.shape[-1]:
            self._compact()
        return cost

    def _compact(self) -> None:
        """Drop rows and columns of what is gone, which are zeros, all at once."""
        mask = torch.ones(self.inverse.shape[-1], dtype=torch.bool)
        mask[self.gone] = False
        left = mask.nonzero().flatten()
        self.inverse = self.inverse.index_select(1, left).index_select(2, left)
        self.gram = self.gram.index_select(1, left).index_select(2, left)
        self.columns = (torch.cumsum(mask, 0) - 1)[self.columns]
        self.gone = self.gone[:0]


def _trace(inverse: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """tr(inverse^-1 gram) over the last two dimensions, never negative."""
    solved = torch.linalg.solve(inverse, gram)
    trace: torch.Tensor = solved.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.clamp_min(0)


def _reader(
    site: Site, group: Group, gathered: _Gathered, felt: torch.Tensor | None
) -> _Reader | None:
    """A site as a reader of a group, None if it does not read it.

    Args:
        site: The site.
        group: The group.
        gathered: Moments of what the site reads.
        felt: See `sensitivities`; None: an error counts as a share of its outputs' variance.
    """
    found = gathered.inputs.get(site)
    owners = site.units(group.axis)
    if found is None or not (owners >= 0).any():
        return None
    xx, total, count = found
    if site.takes_shift:
        xx = xx - total[:, :, None] * total[:, None, :] / count
    weight = gathered.weights[site]
    if felt is not None and felt.ndim:
        scale = float(count)
        rows = weight * felt.reshape(*weight.shape[:2], 1).to(weight)
    else:
        energy = float((weight.transpose(1, 2) @ weight * xx).sum())
        scale = max(energy, _TINY) / max(1.0 if felt is None else float(felt), _TINY)
        rows = weight
    gram = weight.transpose(1, 2) @ rows
    level = xx.diagonal(dim1=1, dim2=2).mean(1)
    level = level.clamp_min(1e-6 * float(level.max()) + _TINY)
    damped = xx.clone()
    noise = _NOISE * found[0].diagonal(dim1=1, dim2=2).mean(1)
    damped.diagonal(dim1=1, dim2=2).add_((_DAMPING * level + noise)[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    order = np.argsort(owners, kind="stable")
    columns = order[np.searchsorted(owners[order], 0) :].reshape(group.size, -1)
    # Constant inputs carry nothing that a bias does not.
    constant = float((gram * xx).sum()) <= _NOISE * float((gram * found[0]).sum())
    gram = torch.zeros_like(gram) if constant else gram / max(scale, _TINY)
    return _Reader(inverse.cpu(), gram.cpu(), torch.from_numpy(columns.copy()))


def _eliminated(readers: list[_Reads], size: int) -> NDArray[np.float64]:
    """Score of each unit: the loss added when it goes, not decreasing in the order of going."""
    alive = np.arange(size)
    at_once = math.ceil(size / _ROUNDS)
    order: list[NDArray[np.int64]] = []
    costs: list[float] = []
    while len(alive):
        losses = torch.stack([r.losses() for r in readers]).sum(0).numpy()
        next_ones = np.argsort(losses, kind="stable")[:at_once]
        costs.append(sum(r.remove(torch.from_numpy(next_ones)) for r in readers))
        order.append(alive[next_ones])
        alive = np.delete(alive, next_ones)
    scores = np.zeros(size)
    # What costs the same still goes in this order.
    later = 1 + 1e-3 * np.arange(size) / size
    scores[np.concatenate(order)] = _rising(costs, [len(o) for o in order]) * later
    return scores


def _rising(costs: list[float], counts: list[int]) -> NDArray[np.float64]:
    """Cost of each unit, where a step that costs less than those before shares with them."""
    pools: list[tuple[float, int]] = []
    for step in zip(costs, counts, strict=True):
        cost, count = step
        while pools and pools[-1][0] * count >= cost * pools[-1][1]:
            before = pools.pop()
            cost, count = cost + before[0], count + before[1]
        pools.append((cost, count))
    return np.concatenate([np.full(count, max(cost, 0.0) / count) for cost, count in pools])
