"""SynFlow: the flow through each unit, computed anew after each round of removals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from depcut.axes import Indices
from depcut.capture.held import held_tensors
from depcut.coupling.groups import Coupling
from depcut.plan.keep import Keep
from depcut.scores.aggregate import by_element, totals
from depcut.scores.context import Context, Scores, criterion
from depcut.scores.scaled_flow import ScaledFlow

ROUNDS = 100  # as in the paper
_HEADROOM = 700  # bits

Alive = list[NDArray[np.bool_]]


@criterion("synflow", members="consumers", normalize=None, initial=True)
def synflow(context: Context) -> Scores:
    """Iterative synaptic flow: when a unit is removed, in rounds of an exponential schedule.

    R is the sum of the outputs of the network made linear and positive (see `Flow`) for an input of
    ones; the flow through a unit is the sum of |w dR/dw| over its members, by default the weights
    that read it. In round k of n = 100 the units of least flow are removed, over all groups
    jointly, until N (m / N)^(k / n) of all N are left; their weights are zero in the rounds that
    follow. m is as many as must stay, at least one a group: no budget is needed, and no group
    loses its last unit before all others are gone. score(u) = (rounds that u has outlived) + (its
    flow in the round that removes it, as a share of the largest), so that the order of the scores
    is the order of removal; for what stays, n + its flow in the last round that removes any.

    All flow passes through a layer without a skip connection, so that the fewer units are left,
    the higher each scores: such a layer does not collapse. Beside a skip connection this does not
    hold: a residual branch that ends without a norm may go down to a single unit where scores are
    ranked over all groups.
    Source: Tanaka et al., Pruning Neural Networks without Any Data by Iteratively Conserving
    Synaptic Flow, NeurIPS 2020, eq. 1 and algorithm 1. Needs no data.
    """
    coupling = context.coupling
    network = _Network.of(context)
    alive: Alive = [np.ones(g.size, dtype=np.bool_) for g in coupling.groups]
    scores = [np.zeros(g.size) for g in coupling.groups]
    least = sum(max(1, g.floor) for g in coupling.groups)
    total = left = sum(g.size for g in coupling.groups)
    flows: Scores = []
    for number in range(ROUNDS):
        wanted = round(total * (least / max(total, 1)) ** ((number + 1) / ROUNDS))
        if wanted >= left and flows:
            continue
        flows = network.flows(context, alive)
        gone = _weakest(coupling, flows, alive, left - wanted)
        for group, removed in enumerate(gone):
            scores[group][removed] = number + flows[group][removed]
            alive[group] &= ~removed
        left = wanted
    for score, flow, rest in zip(scores, flows, alive, strict=True):
        score[rest] = ROUNDS + flow[rest]
    return scores


def _weakest(coupling: Coupling, flows: Scores, alive: Alive, count: int) -> Alive:
    """The units of least flow over all groups, but for the best of each."""
    owner, unit, values = [], [], []
    for group, flow, rest in zip(coupling.groups, flows, alive, strict=True):
        living = np.flatnonzero(rest)
        order = living[np.argsort(flow[living], kind="stable")]
        open_ = order[: max(len(order) - max(1, group.floor), 0)]
        owner.append(np.full(len(open_), group.index))
        unit.append(open_)
        values.append(flow[open_])
    weakest = np.argsort(np.concatenate(values), kind="stable")[:count]
    out: Alive = [np.zeros(g.size, dtype=np.bool_) for g in coupling.groups]
    for group, index in zip(
        np.concatenate(owner)[weakest], np.concatenate(unit)[weakest], strict=True
    ):
        out[group][index] = True
    return out


@dataclass(frozen=True, eq=False)
class _Network:
    """The linear network, and the absolute values of its parameters by canonical name."""

    flow: ScaledFlow
    absolute: dict[str, torch.Tensor]

    @staticmethod
    def of(context: Context) -> _Network:
        held = held_tensors(context.model)
        _ = context.weights  # refuses models without weights
        absolute = {
            name: held[name].detach().double().abs()
            for name in set(context.canonical.values())
            if held[name].is_floating_point()
        }
        return _Network(ScaledFlow(context.coupling, held), absolute)

    def flows(self, context: Context, alive: Alive) -> Scores:
        """Flow through each unit, as a share (less than one) of the largest one."""
        masked = {
            name: tensor.requires_grad_(True)
            for name, tensor in _masked(context.coupling, self.absolute, alive).items()
        }
        names = context.canonical
        with torch.enable_grad():
            total = self.flow.total({n: masked[c] for n, c in names.items() if c in masked})
            # Derivatives grow towards the inputs: a start far down leaves them the whole range.
            total = total * 2.0**-_HEADROOM
            gradients = torch.autograd.grad(total, list(masked.values()), allow_unused=True)
        with torch.no_grad():
            elements = {
                name: torch.zeros_like(tensor) if gradient is None else (tensor * gradient).abs()
                for (name, tensor), gradient in zip(masked.items(), gradients, strict=True)
            }
            flows = totals(context, by_element(elements))
        largest = max(float(f.max()) for f in flows)
        return [f / (largest * (1 + 1e-9)) if largest > 0 else f for f in flows]


def _masked(
    coupling: Coupling, absolute: dict[str, torch.Tensor], alive: Alive
) -> dict[str, torch.Tensor]:
    """Copies of the parameters, zero where a unit that is gone has its slice."""
    units: dict[int, Indices] = {
        i: np.flatnonzero(rest) for i, rest in enumerate(alive) if not rest.all()
    }
    narrowed = Keep(coupling, units).tensors
    out = {}
    for name, tensor in absolute.items():
        masked = tensor.clone()
        for dim, kept in enumerate(narrowed.get(name, ())):
            if kept is not None:
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), kept)
                masked.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
        out[name] = masked
    return out
