"""Reconstruction error of the layers that read a unit, re-solved without it (OBS)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from string import ascii_letters
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from depcut import axes
from depcut.calibration.inputs import Inputs
from depcut.calibration.sensitivity import NoDerivativeError, Sensitivity
from depcut.calibration.sites import find_sites, site_inputs, with_same_inputs
from depcut.calibration.store import Store
from depcut.calibration.visits import STRETCHES, visits
from depcut.calibration.windows import Windows
from depcut.coupling.groups import Coupling
from depcut.graph.ancestry import Weights
from depcut.graph.arguments import Call, bound
from depcut.ops.kinds import MATRIX_PRODUCTS
from depcut.ops.site import Site
from depcut.scores.aggregate import totals
from depcut.scores.context import Context, Score, Scores, criterion
from depcut.scores.elimination import Reads, Terms, Weight, eliminated
from depcut.scores.gathered import given, held
from depcut.scores.magnitude import powers
from depcut.scores.pending import Pending
from depcut.scores.readers import Gathered, readers
from depcut.scores.waiting import Waiting
from depcut.support.processes import Processes

_DAMPING = 1e-2  # of the mean variance of the inputs
_TINY = 1e-30
_NOISE = 1e-12  # of the energy of what is read: what rounding leaves of a variance
_MATRIX = 2
_DOUBLE = 8  # bytes of a number


@criterion("obs", needs="data", aggregate=None, members=None, normalize=None, additive=True)
def obs(context: Context) -> Scores:
    """Loss of reconstruction when units go one after the other, the rest re-solved each time.

    For a weight W (out, in) that reads inputs of covariance H, removing the columns S and
    re-solving the others costs tr(W_S ((H^-1)_SS)^-1 W_S^T); W and H^-1 are then updated for the
    next removal. Rows of W are weighted by the outputs' mean squared derivative with respect to
    them (`sensitivities`): losses of all layers are shares of the outputs' variance and add up.
    A product of two activations that sums over the units (head_dim of queries and keys) adds the
    energy of their terms in it, as nothing there can be re-solved. The cheapest units go first; a
    unit's score is the loss that its removal added. Units that neither reads have their share of
    the group's squared weights.

    Every batch runs forward and backward once, at any depth; and, where that takes several
    stretches, forward once before. A group's units are eliminated as soon as all that reads them
    has been seen, and its moments let go of then.

    Source: Kurtic et al., ZipLM, NeurIPS 2023, eq. 3-5; Hassibi & Stork, NeurIPS 1992 (second-order
    removal); Martens & Grosse, K-FAC, ICML 2015 (rows weighted by squared derivatives). Needs data.
    """
    work = _Elimination(context)
    felt = Sensitivity(context.coupling, context.model, context.data, work.features)
    try:
        with closing(felt.walked(work.shown, work)) as walk:
            return work.scores(walk, felt.found, felt.sum_over_processes)
    except NoDerivativeError:
        # All errors count alike.
        work = _Elimination(context)
        with closing(visits(context.coupling, context.model, context.data, work.shown)) as seen:
            return work.scores(seen, {}, list)


class _Elimination:
    """Units of all groups eliminated, each group's as soon as all that reads it has been seen.

    Args:
        context: What to score.

    Attributes:
        shown: The nodes to be shown, with the bytes of what is gathered there.
        features: Those of which the sensitivity matters, see `sensitivities`.
    """

    def __init__(self, context: Context) -> None:
        self.context, coupling = context, context.coupling
        sites, products = find_sites(coupling), _activation_products(coupling)
        self.features = {
            **dict.fromkeys(p.node for p in products),
            **{s.node: s.family.result for s in sites},
        }
        self.readers: dict[int, list[_Item]] = {group.index: [] for group in coupling.groups}
        every: list[_Item] = [*sites, *products]
        for item in every:
            for leaf in dict.fromkeys(axes.leaves(item.term)):
                if leaf in coupling.group_of:
                    self.readers[coupling.group_of[leaf].index].append(item)
        items = dict.fromkeys(item for found in self.readers.values() for item in found)
        self.at: dict[fx.Node, list[_Item]] = {}
        for item in items:
            self.at.setdefault(item.node, []).append(item)
        self.leaders = with_same_inputs(coupling, [i for i in items if isinstance(i, Site)])
        # What reads a group, those that read the same inputs together: (group, items).
        together: dict[tuple[int, _Item], list[_Item]] = {}
        for number, found in self.readers.items():
            for item in found:
                together.setdefault((number, self._leader(item)), []).append(item)
        self.parts = [(number, leader, found) for (number, leader), found in together.items()]
        self.partly = Pending({i: [*found, leader] for i, (_, leader, found) in self._numbered()})
        self.of_group: dict[int, list[int]] = {number: [] for number in self.readers}
        for i, (number, _, _) in self._numbered():
            self.of_group[number].append(i)
        self.pending = Pending(self.of_group)
        self.aside: dict[int, list[Reads]] = {}
        self.shown = {n: sum(map(self._bytes, found)) for n, found in self.at.items()}
        self.gathered = _Gathered()
        self.out: dict[int, NDArray[np.float64]] = {}
        self.stretches: list[list[fx.Node]] = []  # what was shown in each
        self.store = Store(context.data.memory // STRETCHES, context.data.trail)
        self.stores = [self.store]

    def state(self) -> Any:
        """What was gathered and scored so far; items by their place among all of them."""
        place = {item: i for i, item in enumerate(i for found in self.at.values() for i in found)}
        gathered = {
            name: {place[item]: value for item, value in found.items()}
            for name, found in vars(self.gathered).items()
        }
        return held({"gathered": gathered, "aside": self.aside, "out": self.out}), self.stretches

    def restore(self, state: Any) -> bool:
        """Have what an earlier process has gathered and scored."""
        items = [item for found in self.at.values() for item in found]
        found, self.stretches = given(state[0], self.store), state[1]
        for name, gathered in found["gathered"].items():
            vars(self.gathered)[name].update({items[i]: v for i, v in gathered.items()})
        self.aside, self.out = found["aside"], found["out"]
        read: set[int] = set()
        for nodes in self.stretches:
            parts = self.partly.ready([item for node in nodes for item in self.at[node]])
            complete = self.pending.ready(parts)
            away = [p for p in parts if self.parts[p][0] not in complete and self._waits(p)]
            for part in [*(p for number in complete for p in self.of_group[number]), *away]:
                if part not in read:
                    self.partly.done(part)
                    read.add(part)
        return True

    def _waits(self, part: int) -> bool:
        """Whether a part of an incomplete group is put aside."""
        return isinstance(self.parts[part][1], Site)

    def scores(
        self,
        walk: Iterator[tuple[int, fx.Node, Call] | None],
        felt: Mapping[fx.Node, torch.Tensor],
        complete: Callable[[Iterable[fx.Node]], object],
    ) -> Scores:
        """The scores of all groups.

        Args:
            walk: (number of the batch, node, values of its arguments) of the nodes to be shown;
                None where all batches have passed what was shown.
            felt: What `sensitivities` finds, by then of what was shown.
            complete: Adds to it, of nodes, what other processes have found.
        """
        seen: dict[fx.Node, None] = {}
        with self.store:
            for visit in chain(walk, [None]):
                if visit is not None:
                    seen[visit[1]] = None
                    self._gather(*visit)
                    continue
                items = [item for node in seen for item in self.at[node]]
                complete(seen)
                _sum_over_processes(self.gathered, items, self.context.data.everyone)
                self._go_on(self.partly.ready(items), felt, self.store)
                self.stretches.append(list(seen))
                seen.clear()
        groups = self.context.coupling.groups
        plain = _shares(self.context) if any(g.index not in self.out for g in groups) else []
        return [self.out[g.index] if g.index in self.out else plain[g.index] for g in groups]

    def _leader(self, item: _Item) -> _Item:
        """The item whose moments are those of an item, too."""
        return self.leaders.get(item, item) if isinstance(item, Site) else item

    def _gather(self, number: int, node: fx.Node, call: Call) -> None:
        """Take in what a batch shows of a node."""
        data, gathered = self.context.data, self.gathered
        for item in self.at[node]:
            if not isinstance(item, Site):
                _add_terms(gathered, item, call)
                continue
            if item not in gathered.weights:
                gathered.weights[item] = item.family.matrix(call).detach()
            if item not in self.leaders:
                inputs = gathered.inputs.setdefault(item, Inputs())
                windows = Windows.of(item, call)
                if windows is None:
                    inputs.add(site_inputs(item, call, data.batches[number].valid))
                else:
                    inputs.add(windows)

    def _numbered(self) -> list[tuple[int, tuple[int, _Item, list[_Item]]]]:
        return list(enumerate(self.parts))

    def _go_on(self, parts: list[int], felt: Mapping[fx.Node, torch.Tensor], store: Store) -> None:
        """Score the groups of which all readers have been seen; put aside those of the others.

        Args:
            parts: Of the readers, by number, those that have just been seen.
            felt: See `scores`.
            store: Where the others wait.
        """
        complete = self.pending.ready(parts)
        for number in complete:
            found = [reader for part in self.of_group[number] for reader in self._read(part, felt)]
            group = self.context.coupling.groups[number]
            if found:
                scores = eliminated(found, group.rows, group.size)
                self.out[number] = scores if group.row_axis is not None else scores[0]
        for part in parts:
            if self.parts[part][0] not in complete and self._waits(part):
                found = self._read(part, felt)
                self.aside[part] = [
                    Waiting(reader, store, (part, i)) if isinstance(reader, Weight) else reader
                    for i, reader in enumerate(found)
                ]

    def _read(self, part: int, felt: Mapping[fx.Node, torch.Tensor]) -> list[Reads]:
        """The readers of a part; what nothing else needs of what they were made of is let go of."""
        if part in self.aside:
            return self.aside.pop(part)
        number, leader, items = self.parts[part]
        group = self.context.coupling.groups[number]
        if isinstance(leader, Site):
            sites = [item for item in items if isinstance(item, Site)]
            for site in sites:
                self.gathered.inputs.setdefault(site, self.gathered.inputs[leader])
            found = readers(sites, group, self.gathered, felt)
        else:
            sensitivity = felt.get(leader.node)
            scale = 1.0 if sensitivity is None else float(sensitivity.sum())
            found = [Terms.of(self.gathered.products[leader], scale, group.rows)]
        for item in self.partly.done(part):
            self.gathered.forget(item)
        return found

    def _bytes(self, item: _Item) -> int:
        """Of what is gathered of an item."""
        if isinstance(item, Site) and item in self.leaders:
            return 0
        columns = axes.resolve(item.term).size
        return _DOUBLE * columns**2


def _shares(context: Context) -> Scores:
    """Each unit's share of the sum of squares over all members of its group."""
    plain = replace(context, score=Score("l2", aggregate="sum", members="all"))
    sums = totals(plain, powers(plain, 2))
    return [t / s if (s := float(t.sum())) > 0 else np.full_like(t, 1 / len(t)) for t in sums]


@dataclass(frozen=True, eq=False)
class _ActivationProduct:
    """A node that sums over an axis of two activations.

    Attributes:
        node: The node.
        places: (argument, dimension) of either activation.
        term: The summed dimension.
        heads: Size of the outer axis of what is summed, if it is the last batch dimension of both.
    """

    node: fx.Node
    places: tuple[tuple[fx.Node, int], tuple[fx.Node, int]]
    term: axes.Axis
    heads: int | None


_Item = Site | _ActivationProduct


def _activation_products(coupling: Coupling) -> list[_ActivationProduct]:
    """Products of two activations that sum over nothing but one axis."""
    out = []
    weights = Weights(coupling.program)
    for node, effects in coupling.effects.items():
        if len(effects.contracts) != 2 or node.graph is not coupling.program.graph.graph:
            continue
        first, second = effects.contracts
        dims = coupling.env[first[0]]
        term = axes.resolve(dims[first[1]]) if isinstance(dims, tuple) else None
        computed = not any(weights.behind(n) for n, _ in effects.contracts)
        two = first[0] is not second[0] and len(node.all_input_nodes) >= 2
        if computed and two and isinstance(term, axes.Axis) and node.target in MATRIX_PRODUCTS:
            heads = _heads(coupling, (first[0], second[0]), term)
            out.append(_ActivationProduct(node, (first, second), term, heads))
    return out


def _heads(coupling: Coupling, operands: tuple[fx.Node, fx.Node], term: axes.Axis) -> int | None:
    """Size of the outer axis of a summed axis, where it is the third dimension from the end."""
    group = coupling.group_of.get(term)
    if group is None or group.row_axis is None:
        return None
    for node in operands:
        dims = coupling.env[node]
        if not isinstance(dims, tuple) or len(dims) <= _MATRIX:
            return None
        if axes.resolve(dims[-3]) is not group.row_axis:
            return None
    return group.row_axis.size


@dataclass(frozen=True)
class _Gathered(Gathered):
    """What the data show of sites and of products.

    Attributes:
        products: By product, Gram matrices of its terms (rows or 1, units, units).
    """

    products: dict[_ActivationProduct, NDArray[np.float64]] = field(default_factory=dict)

    def forget(self, item: _Item) -> None:
        """Let go of what was collected of a site or a product."""
        if isinstance(item, Site):
            self.inputs.pop(item, None)
            self.weights.pop(item, None)
        else:
            self.products.pop(item, None)


def _sum_over_processes(gathered: _Gathered, items: Iterable[_Item], everyone: Processes) -> None:
    """Sums over the batches of all processes in place of those of this one."""
    if everyone.size == 1:
        return
    for item in items:
        if not isinstance(item, Site):
            held = [torch.from_numpy(gathered.products[item])]
            (summed,) = everyone.summed(f"terms of {item.node.name}", held)
            gathered.products[item] = summed.numpy()
        elif item in gathered.inputs:
            gathered.inputs[item].join_processes(item.name, everyone)


def _add_terms(gathered: _Gathered, product: _ActivationProduct, call: Call) -> None:
    """Gram matrix of the rank-one terms a_d b_d^T of a product: (A^T A) * (B^T B) by element."""
    squares = [_squares(product, call, which) for which in (0, 1)]
    a, b = squares
    if a.ndim == b.ndim and a.ndim > _MATRIX and a.shape[-3] != b.shape[-3]:
        # Grouped queries: every key belongs to several of them.
        most = max(a.shape[-3], b.shape[-3])
        a, b = (v.repeat_interleave(most // v.shape[-3], -3) for v in (a, b))
    both, heads = a * b, product.heads
    if heads is not None and both.ndim > _MATRIX and both.shape[-3] == heads:
        gram = both.reshape(-1, heads, *both.shape[-2:]).sum(0).cpu().numpy()
    else:
        gram = both.reshape(-1, *both.shape[-2:]).sum(0, keepdim=True).cpu().numpy()
    gathered.products[product] = gathered.products.get(product, 0.0) + gram


def _squares(product: _ActivationProduct, call: Call, which: int) -> torch.Tensor:
    """A^T A over all that only one of the two activations has, (batch..., units, units)."""
    source, dim = product.places[which]
    given = bound(product.node, product.node.args, product.node.kwargs)
    name = next(n for n, v in given.items() if v is source or _lists(v, source))
    if given[name] is source:
        x = call[name].movedim(dim, -1).double()
        x = x if x.ndim > 1 else x[None]
        return x.transpose(-1, -2) @ x  # type: ignore[no-any-return]
    listed: Any = given[name]
    place = list(listed).index(source)
    labels = call["equation"].replace(" ", "").partition("->")[0].split(",")
    own, other, unit = labels[place], labels[1 - place], labels[place][dim]
    batch = "".join(c for c in own if c in other and c != unit)
    twin = next(c for c in ascii_letters if c not in call["equation"])
    x = call[name][place].double()
    return torch.einsum(f"{own},{own.replace(unit, twin)}->{batch}{unit}{twin}", x, x)


def _lists(value: object, source: fx.Node) -> bool:
    return isinstance(value, list | tuple) and any(v is source for v in value)
