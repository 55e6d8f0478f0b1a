"""Penalties on whole units, so that training itself makes some of them removable without loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from depcut import axes
from depcut.allocate.named import matching
from depcut.analysis import Analysis
from depcut.apply.plan import Plan
from depcut.capture.plain import origin_of, refuse_spread
from depcut.errors import InputError, PlanError
from depcut.plan.keep import Keep
from depcut.support.checks import check_integer, check_kind, check_names, check_number

_TINY = 1e-12  # under the root, whose slope at 0 is infinite


_POSITIVE = "pass a finite number above 0"
_ANALYSIS = "pass what depcut.analyze(model, inputs) returned"


@dataclass(frozen=True, eq=False)
class _Slices:
    """Squared norms of units as one gather: which index of which parameter goes to which unit.

    Attributes:
        parameters: The model's own, each once.
        dims: For each entry, (position in `parameters`, dimension).
        index: Number of the unit that each index of each entry belongs to; the last: to none.
        sizes: Number of elements of each unit.
        groups: Where each group's units begin, by group number.
    """

    parameters: tuple[nn.Parameter, ...]
    dims: tuple[tuple[int, int], ...]
    index: torch.Tensor
    sizes: torch.Tensor
    groups: dict[int, int]

    def squares(self) -> torch.Tensor:
        """Sum of the squares of all that each unit owns, [units], differentiable."""
        device = self.parameters[0].device
        squared = [p.float().square() for p in self.parameters]
        parts = []
        for number, dim in self.dims:
            others = [d for d in range(squared[number].ndim) if d != dim]
            summed = squared[number].sum(others) if others else squared[number]
            parts.append(summed.to(device))
        index = self.index.to(device)
        total = torch.zeros(len(self.sizes) + 1, device=device)
        return total.index_add(0, index, torch.cat(parts))[:-1]


def _slices(analysis: Analysis, groups: Collection[int]) -> _Slices:
    coupling, held = (
        analysis.coupling,
        dict(analysis.model.named_parameters(remove_duplicate=False)),
    )
    starts, count = {}, 0
    for number in sorted(groups):
        starts[number] = count
        count += coupling.groups[number].size
    parameters: dict[int, tuple[int, nn.Parameter]] = {}
    dims, index = [], []
    sizes = np.zeros(count + 1, dtype=np.int64)
    seen: set[tuple[int, int, int]] = set()
    for number, start in starts.items():
        group = coupling.groups[number]
        for member in group.members:
            parameter = held.get(member.tensor)
            if parameter is None or not parameter.is_floating_point():
                continue
            entry, _ = parameters.setdefault(id(parameter), (len(parameters), parameter))
            if (entry, member.dim, number) in seen:
                continue  # a shared parameter counts once
            seen.add((entry, member.dim, number))
            owner = axes.units(coupling.dims[member.tensor][member.dim], group.axis)
            places = np.where(owner < 0, count, owner + start)
            dims.append((entry, member.dim))
            index.append(places)
            np.add.at(sizes, places, parameter.numel() // max(parameter.shape[member.dim], 1))
    kept = [p for _, p in parameters.values()]
    return _Slices(
        tuple(kept),
        tuple(dims),
        torch.from_numpy(np.concatenate(index)),
        torch.from_numpy(sizes[:-1]),
        starts,
    )


class GroupLasso:
    """Group lasso over the units of an analysis: strength x sum of sqrt(p_u) ||w_u||_2.

    w_u is all that unit u owns (rows that make it, columns that read it, biases, norm scales) and
    p_u the number of its elements. Add it to the loss: `loss + penalty()`. Units that the task does
    not need go to zero as a whole, so that `depcut.shrink` removes them without loss.

    Source: Yuan & Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006,
    eq. 2.1; Wen et al., Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016, eq. 2.
    A weight between two groups belongs to a unit of each: the groups overlap.

    Args:
        analysis: Of the model that is being trained; its parameters are read at every call.
        strength: Factor of the penalty.
        ignore: Globs over module or parameter names whose units are not penalised.

    Raises:
        InputError: The strength is not positive, or nothing is left to penalise.
    """

    def __init__(self, analysis: Analysis, strength: float, *, ignore: Iterable[str] = ()) -> None:
        check_kind(analysis, Analysis, "analysis", _ANALYSIS)
        refuse_spread(origin_of(analysis.model))  # a plain model stands for it in the analysis
        strength = check_number(strength, "strength", _POSITIVE, above=0)
        self.analysis, self.strength = analysis, strength
        patterns = check_names(ignore, "ignore", "pass globs over module or parameter names")
        spared = {i for p in patterns for i in matching(analysis.coupling, p, "ignore=")}
        chosen = {g.index for g in analysis.groups} - spared
        if not chosen:
            raise InputError(
                "there are no units to penalise",
                where="GroupLasso",
                remedy="see print(analysis): a group is needed that ignore= does not hold",
            )
        self._slices = _slices(analysis, chosen)

    def __call__(self) -> torch.Tensor:
        """The penalty now, a differentiable scalar."""
        squares = self._slices.squares()
        weight = self._slices.sizes.to(squares).sqrt()
        return self.strength * (weight * (squares + _TINY).sqrt()).sum()

    def norms(self) -> dict[str, torch.Tensor]:
        """The L2 norm of every unit, [units], by group name."""
        with torch.no_grad():
            values = self._slices.squares().sqrt()
        groups = self.analysis.groups
        return {
            groups[n].name: values[start : start + groups[n].size]
            for n, start in self._slices.groups.items()
        }


class GrowingRegularization:
    """An L2 penalty on the units that a plan removes, growing until they are gone.

    lambda / 2 x sum of ||w_u||^2 over the units to remove, lambda growing by `increment` every
    `every` calls of `step()` up to `ceiling`. At the end, `plan.apply(model)` changes little.

    Source: Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, section 3.2 (GReg-1).

    Args:
        analysis: Of the model that is being trained.
        plan: Which units go; made by the same analysis.
        increment: Delta lambda.
        every: K_u, steps between two increments.
        ceiling: tau, the largest lambda.

    Raises:
        InputError: A number is not positive.
        PlanError: The plan is of another architecture, or removes nothing.
    """

    def __init__(
        self,
        analysis: Analysis,
        plan: Plan,
        *,
        increment: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
    ) -> None:
        check_kind(analysis, Analysis, "analysis", _ANALYSIS)
        refuse_spread(origin_of(analysis.model))  # a plain model stands for it in the analysis
        check_kind(plan, Plan, "plan", "pass what analysis.plan(...) returned")
        increment = check_number(increment, "increment", _POSITIVE, above=0)
        ceiling = check_number(ceiling, "ceiling", _POSITIVE, above=0)
        every = check_integer(every, "every", 1)
        keep = plan.keep(analysis.coupling)
        if not keep.units:
            raise PlanError(
                "the plan removes nothing",
                where="plan=",
                remedy="pass a plan that does, e.g. analysis.plan(0.5)",
            )
        self.increment, self.every, self.ceiling = increment, every, ceiling
        self.steps = 0
        self._gone = _removed(analysis, keep)

    @property
    def strength(self) -> float:
        """Lambda now."""
        return min(self.increment * (self.steps // self.every), self.ceiling)

    def step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1

    def __call__(self) -> torch.Tensor:
        """The penalty now, a differentiable scalar."""
        total = torch.zeros((), device=self._gone[0][0].device)
        for number, (parameter, flags) in enumerate(self._gone):
            if flags.device != parameter.device:
                self._gone[number] = parameter, flags.to(parameter.device)
            total = total + (parameter.square() * self._gone[number][1]).sum().to(total)
        return 0.5 * self.strength * total


def _removed(analysis: Analysis, keep: Keep) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Parameters with ones at what units that go own of a dimension, to broadcast."""
    held = dict(analysis.model.named_parameters(remove_duplicate=False))
    entries: dict[tuple[int, int, int], tuple[nn.Parameter, torch.Tensor]] = {}
    for number in sorted(keep.units):
        group = analysis.coupling.groups[number]
        one = Keep(analysis.coupling, {number: keep.units[number]})
        for member in group.members:
            parameter = held.get(member.tensor)
            if parameter is None or not parameter.is_floating_point():
                continue
            gone = ~one.stays(analysis.coupling.dims[member.tensor], member.dim)
            # a shared parameter counts once
            entries.setdefault(
                (id(parameter), member.dim, number),
                (parameter, torch.from_numpy(gone).to(parameter)),
            )
    return list(entries.values())
