"""Repair a narrowed model: re-solve what reads removed units so that layers give what they gave.

Layer by layer in the order of execution, the kept columns of each weight are solved by least
squares for the dense layer's outputs, from the inputs that the layers before, repaired already,
deliver. Sources: He et al., Channel Pruning, ICCV 2017, eq. 1 (reconstruction, sequential); Frantar &
Alistarh, Optimal Brain Compression, NeurIPS 2022 (closed form from second moments); Nagel et al.,
Data-Free Quantization, ICCV 2019, section 4.2 (biases take the mean).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from depcut.calibration.data import Calibration
from depcut.calibration.lockstep import Lockstep
from depcut.calibration.moments import folded
from depcut.calibration.progress import bar
from depcut.calibration.site import Call, Site, bound
from depcut.calibration.sites import find_sites
from depcut.calibration.solve import Solution, solve
from depcut.capture import held_tensors
from depcut.keep import Keep
from depcut.reference import Step

_SAME = 1e-6  # relative difference of inputs that counts as rounding
_NORMS = ("aten.batch_norm.default",)


@dataclass(frozen=True)
class Repair:
    """What was done to one layer.

    Attributes:
        layer: Its name.
        before: Share of the outputs' variance that is missed without repair, held out.
        after: The same with it.
        ridge: Regularisation, relative to the mean variance of the inputs; infinite: only the
            bias was changed.
    """

    layer: str
    before: float
    after: float
    ridge: float


@dataclass(frozen=True)
class Compensation:
    """What compensation did.

    Attributes:
        repairs: Layer by layer, in the order of execution.
        left: Layers that read narrowed or changed inputs and were left as they are, with the
            reason.
    """

    repairs: tuple[Repair, ...]
    left: dict[str, str]


def compensate(
    slim: nn.Module, model: nn.Module, keep: Keep, calibration: Calibration
) -> Compensation:
    """Re-solve the weights of a narrowed model in place.

    Args:
        slim: The narrowed model, verified; its parameters and running statistics change.
        model: The dense model.
        keep: What stays.
        calibration: Batches to reproduce the dense outputs on.
    """
    with torch.no_grad():
        return _Repairer(slim, model, keep, calibration).run()


class _Repairer:
    def __init__(
        self, slim: nn.Module, model: nn.Module, keep: Keep, calibration: Calibration
    ) -> None:
        self.slim, self.model, self.keep, self.calibration = slim, model, keep, calibration
        self.program = keep.coupling.program
        self.sites: dict[fx.Node, list[Site]] = {}
        for site in find_sites(keep.coupling):
            self.sites.setdefault(site.node, []).append(site)
        self.norms = [n for n in self.program.graph.graph.nodes if str(n.target) in _NORMS]
        self.uses = Counter(
            name
            for graph in (self.program, self.program.training)
            if graph is not None
            for node, name in graph.tensors.items()
            for _ in node.users
        )
        self.tensors = self._narrowed()
        self.repairs: list[Repair] = []
        self.left: dict[str, str] = {}

    def _narrowed(self) -> dict[str, torch.Tensor]:
        """Copies of the narrowed model's own tensors."""
        held = held_tensors(self.slim)
        names = set(self.program.tensors.values()) - self.program.anonymous
        return {n: held[n].detach().clone() for n in names if n in held}

    def run(self) -> Compensation:
        order = {node: i for i, node in enumerate(self.program.graph.graph.nodes)}
        stops = sorted([*self.sites, *self.norms], key=lambda n: order[n])
        both = Lockstep(self.keep, self.model, self.tensors, self.calibration, stops)
        with bar(self.calibration) as progress:
            for node in progress.track(stops, description="compensate"):
                both.advance()
                if node in self.sites:
                    for site in self.sites[node]:
                        self._site(site, both)
                else:
                    self._norm(node, both)
        held = held_tensors(self.slim)
        for name, tensor in self.tensors.items():
            held[name].data.copy_(tensor)
        return Compensation(tuple(self.repairs), self.left)

    def _site(self, site: Site, both: Lockstep) -> None:
        if self._untouched(site, both):
            return
        reason = self._obstacle(site)
        if reason:
            self.left[site.name] = reason
            return
        call = self._call(next(both.steps())[1])
        weight = site.family.matrix(call)
        absorbs = bool(site.biases) or self._feeds_norm(site.node)
        bias = torch.zeros(weight.shape[:2]) if absorbs else None
        for name in site.biases:
            bias = bias + self.tensors[name].reshape(weight.shape[:2])
        solution = solve(folded(self._pairs(site, both, weight)), weight, bias)
        site.family.write(call, solution.weight.to(weight.dtype))
        if site.biases:
            for name in site.biases:
                self.tensors[name].zero_()
            first = self.tensors[site.biases[0]]
            first.copy_(solution.bias.reshape(first.shape))
        self.repairs.append(Repair(site.name, solution.before, solution.after, solution.ridge))

    def _pairs(
        self, site: Site, both: Lockstep, weight: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(batch, narrowed inputs, the dense layer's outputs that stay)."""
        rows = self.keep.indices(site.rows)
        for number, (dense, slim) in enumerate(both.steps()):
            wide, narrow = self._call(dense), self._call(slim)
            x = site.family.inputs(wide)
            y = x @ site.family.matrix(wide).transpose(1, 2)
            for name in site.biases:
                y = y + held_tensors(self.model)[name].reshape(len(y), 1, -1)
            flat = y.transpose(0, 1).flatten(1)
            if rows is not None:
                flat = flat[:, torch.from_numpy(rows).to(flat.device)]
            target = flat.unflatten(1, weight.shape[:2]).transpose(0, 1)
            yield number, self._read(site, narrow, x), target

    def _read(self, site: Site, narrow: Call, dense: torch.Tensor) -> torch.Tensor:
        """The narrowed inputs; what a cell reads of itself is taken from the dense run."""
        x = site.family.inputs(narrow)
        if site.own:
            kept = self.keep.indices(site.term)
            own = sum(self.keep.count(t) for c in site.columns[-site.own :] for t in c)
            picked = dense if kept is None else dense[..., torch.from_numpy(kept)]
            x = torch.cat([x[..., : x.shape[-1] - own], picked[..., x.shape[-1] - own :]], -1)
        return x

    def _untouched(self, site: Site, both: Lockstep) -> bool:
        """Whether the inputs are the dense ones, so that there is nothing to repair."""
        if self.keep.narrows(site.term) or self.keep.narrows(site.rows):
            if self.keep.narrows(site.term):
                return False
        dense, slim = next(both.steps())
        x, given = (site.family.inputs(self._call(s)) for s in (dense, slim))
        if x.shape != given.shape:
            return False
        return float((x - given).abs().max()) <= _SAME * float(x.abs().max())

    def _obstacle(self, site: Site) -> str:
        """Why the weights of a site cannot be changed, "" if they can."""
        for name in (*site.weights, *site.biases):
            if len(self.program.aliases.get(name, ())) > 1 or self.uses[name] > 1:
                return f"{name} is used more than once"
            if name not in self.tensors:
                return f"{name} does not exist in the narrowed model"
        return ""

    def _feeds_norm(self, node: fx.Node) -> bool:
        """Whether a batch norm, which can take a shift, is all that reads the result."""
        return all(user in self.norms for user in node.users) and bool(node.users)

    def _norm(self, node: fx.Node, both: Lockstep) -> None:
        """Shift and scale running statistics as the calibration batches' own moved."""
        pairs = [(self._call(d), self._call(s)) for d, s in both.steps()]
        names = [self.program.tensors.get(node.args[i]) for i in (3, 4)]
        if None in names or any(n not in self.tensors for n in names):
            return
        kept = self.keep.indices(self.keep.coupling.env[node][1])
        before = _statistics([p[0]["input"] for p in pairs])
        after = _statistics([p[1]["input"] for p in pairs])
        if kept is not None:
            before = tuple(b[torch.from_numpy(kept)] for b in before)
        mean, variance = (self.tensors[n] for n in names)
        mean += (after[0] - before[0]).to(mean.dtype)
        variance *= (after[1] / before[1].clamp_min(1e-12)).clamp(1e-2, 1e2).to(variance.dtype)

    def _call(self, step: Step) -> Call:
        return bound(step.node, step.args, step.kwargs)


def _statistics(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance by channel."""
    count = total = square = 0.0
    for value in values:
        flat = value.double().transpose(0, 1).flatten(1)
        count += flat.shape[1]
        total = total + flat.sum(1)
        square = square + flat.square().sum(1)
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0)
