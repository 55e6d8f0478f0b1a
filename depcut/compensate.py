"""Repair a narrowed model: re-solve what reads removed units so that layers give what they gave.

Layer by layer in the order of execution, the kept columns of each weight are solved by least
squares for the dense layer's outputs, from the inputs that the layers before, repaired already,
deliver. Sources: He et al., Channel Pruning, ICCV 2017, eq. 1 (reconstruction, in sequence);
Frantar & Alistarh, Optimal Brain Compression, NeurIPS 2022 (closed form from second moments); Nagel
et al., Data-Free Quantization, ICCV 2019, section 4.2 (biases take the mean).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from depcut.calibration.data import Calibration
from depcut.calibration.lockstep import Lockstep
from depcut.calibration.moments import folded
from depcut.calibration.products import Product
from depcut.calibration.progress import bar
from depcut.calibration.site import Call, Site, bound
from depcut.calibration.sites import find_sites, takes_shift
from depcut.calibration.solve import solve
from depcut.capture import held_tensors, modes
from depcut.errors import VerificationError
from depcut.keep import Keep
from depcut.observe import error
from depcut.reference import Step, kept_part

_TOLERANCE = 1e-2  # relative, between the repaired graph and model: rounding alone
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
        gone = self.keep.gone.nodes
        stops = [n for n in (*self.sites, *self.norms) if n not in gone]
        stops.sort(key=lambda n: order[n])
        both = Lockstep(self.keep, self.model, self.tensors, self.calibration, stops)
        with bar(self.calibration) as progress:
            for node in progress.track(stops, description="compensate"):
                both.advance()
                if node in self.sites:
                    for site in self.sites[node]:
                        self._site(site, both)
                else:
                    self._norm(node, both)
        expected = both.outputs()
        held = held_tensors(self.slim)
        for name, tensor in self.tensors.items():
            held[name].data.copy_(tensor)
        self._verify(expected)
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
        absorbs = takes_shift(site)
        added = [self.tensors[name].reshape(weight.shape[:2]) for name in site.biases]
        start = weight.new_zeros(weight.shape[:2])
        bias = sum(added, start) if absorbs else None
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
        stream = _stream(site)
        for number, (dense, slim) in enumerate(both.steps()):
            wide, narrow = self._call(dense), self._call(slim)
            x = site.family.inputs(wide)
            y = x @ site.family.matrix(wide).transpose(1, 2)
            for name in site.biases:
                y = y + held_tensors(self.model)[name].reshape(len(y), 1, -1)
            flat = y.transpose(0, 1).flatten(1)
            if rows is not None:
                flat = flat[:, torch.from_numpy(rows).to(flat.device)]
            if stream is not None:
                flat = flat + self._drift(dense, slim, stream).reshape(flat.shape)
            target = flat.unflatten(1, weight.shape[:2]).transpose(0, 1)
            yield number, self._read(site, narrow, x), target

    def _drift(self, dense: Step, slim: Step, stream: fx.Node) -> torch.Tensor:
        """What the stream that the result is added to has lost so far."""
        before, after = dense.values[stream], slim.values[stream]
        kept = kept_part(before, self.keep, self.keep.coupling.env[stream])
        return kept - torch.as_tensor(after)

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

    def _norm(self, node: fx.Node, both: Lockstep) -> None:
        """Shift and scale running statistics as the calibration batches' own moved."""
        pairs = [(self._call(d), self._call(s)) for d, s in both.steps()]
        found = [self.program.tensors.get(node.args[i]) for i in (3, 4)]  # type: ignore[arg-type]
        names = [n for n in found if n in self.tensors]
        dims = self.keep.coupling.env[node]
        if len(names) != len(found) or not isinstance(dims, tuple):
            return
        kept = self.keep.indices(dims[1])
        before, after = (_statistics([p[i]["input"] for p in pairs]) for i in (0, 1))
        old = [b if kept is None else b[torch.from_numpy(kept).to(b.device)] for b in before]
        mean, variance = (self.tensors[str(n)] for n in names)
        mean += (after[0] - old[0]).to(mean.dtype)
        variance *= (after[1] / old[1].clamp_min(1e-12)).clamp(1e-2, 1e2).to(variance.dtype)

    def _verify(self, expected: list[Any]) -> None:
        """Refuse a model that gives other outputs than the graph that was repaired."""
        args, kwargs = self.calibration.arguments(self.calibration.batches[0])
        with modes(self.slim, ()):
            outputs = pytree.tree_leaves(self.slim(*args, **kwargs))
        size, message = error(expected, outputs)
        if message or not size <= _TOLERANCE:
            raise VerificationError(
                message or f"after compensation, outputs differ by {size:.3g} of their scale",
                where=type(self.slim).__name__,
                remedy="pass compensate=False, and please report the model",
            )

    def _call(self, step: Step) -> Call:
        return bound(step.node, step.args, step.kwargs)


def _stream(site: Site) -> fx.Node | None:
    """The node that the result of a linear layer is added to, if it was computed before."""
    if not isinstance(site.family, Product) or site.family.features != -1:
        return None
    node = site.node
    while len(node.users) == 1:
        (user,) = node.users
        name = str(user.target)
        if "dropout" in name:
            node = user
            continue
        others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
        if name.startswith("aten.add") and len(user.args) == 2 and len(others) == 1:
            return others[0] if others[0] < site.node else None
        return None
    return None


def _statistics(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance by channel."""
    flat = [v.double().transpose(0, 1).flatten(1) for v in values]
    count = sum(f.shape[1] for f in flat)
    mean = torch.stack([f.sum(1) for f in flat]).sum(0) / count
    spread = torch.stack([(f - mean[:, None]).square().sum(1) for f in flat]).sum(0)
    return mean, spread / count
