"""What can shrink with what, what cannot and why; and plans made from it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import Any

import networkx as nx
from rich.console import Console
from rich.table import Table
from torch import nn

from depcut import axes, cost
from depcut.axes import Indices
from depcut.capture import capture
from depcut.choose import Chooser, Request, check_ratio
from depcut.cost import Cost
from depcut.coupling import Coupling, Frozen, Group, infer, layer_of
from depcut.errors import BudgetError, InputError, listed
from depcut.inputs import Inputs
from depcut.plan import Plan, make_plan
from depcut.program import Program
from depcut.scores import Criterion


@dataclass(frozen=True, eq=False)
class Analysis:
    """Groups of coupled dimensions of one model.

    Attributes:
        model: The model analysed; it is only read.
        coupling: What inference found.
    """

    model: nn.Module
    coupling: Coupling

    @property
    def program(self) -> Program:
        """The captured model."""
        return self.coupling.program

    @property
    def groups(self) -> tuple[Group, ...]:
        """Units that can only be removed together."""
        return self.coupling.groups

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """Dimensions that cannot shrink, each with its reason and source line."""
        return self.coupling.frozen

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """MACs, parameters and channels as functions of the kept counts."""
        return {name: build(self.coupling) for name, build in cost.COSTS.items()}

    @property
    def macs(self) -> int:
        """MACs of one example of the dense model."""
        return round(self.costs["macs"].total)

    @property
    def params(self) -> int:
        """Parameters of the dense model, shared ones once."""
        return round(self.costs["params"].total)

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Layers and groups: edges from a layer to the groups it produces and to their readers."""
        graph = nx.DiGraph()
        for group in self.groups:
            graph.add_node(group.name, kind="group", size=group.size, tied=group.tied)
            for member in group.members:
                layer = "layer:" + layer_of(member.tensor)
                graph.add_node(layer, kind="layer")
                ends = (layer, group.name) if member.role == "producer" else (group.name, layer)
                graph.add_edge(*ends, tensor=member.tensor, dim=member.dim)
        return graph

    def plan(
        self,
        ratio: float,
        *,
        of: str = "macs",
        score: str | Criterion = "magnitude",
        allocation: str = "uniform",
        align: int = 8,
        keep: Iterable[str] = (),
        ratios: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Plan:
        """Choose the units that stay.

        Args:
            ratio: Fraction removed of the quantity named by `of`, in (0, 1).
            of: "macs", "params" or "channels" (every group loses that share).
            score: Name of a criterion, or a function of (coupling, model, seed).
            allocation: "uniform" (every group loses the same share) or "global" (score per cost).
            align: Kept widths are multiples of it where the width allows; 1: any width.
            keep: Globs over module or parameter names whose width must stay.
            ratios: Fraction of units removed, by glob, for groups that the budget does not decide.
            seed: For criteria that draw.

        Raises:
            InputError: An option has a wrong value, or a name matches nothing.
            BudgetError: The ratio cannot be reached, or nothing can be removed.
        """
        check_ratio(ratio, "ratio=")
        if of not in cost.COSTS:
            raise InputError(
                f"unknown quantity {of!r}",
                where="of=",
                remedy=f"use one of {', '.join(cost.COSTS)}",
            )
        if not self.groups:
            self._nothing()
        request = Request(score, allocation, align, keep, ratios or {}, seed)
        chooser = Chooser(self.coupling, self.model, request)
        quantity = self.costs[of]
        counts = chooser.meet(quantity, quantity.total * (1 - ratio), of)
        return chooser.plan(counts, {"ratio": float(ratio), "of": of})

    def plan_keeping(self, kept: Mapping[str, Sequence[int] | Indices]) -> Plan:
        """A plan from kept units by group name; groups not named keep everything.

        Raises:
            PlanError: Unknown group, impossible units, or unequal counts where they are tied.
        """
        return make_plan(self.coupling, self.model, kept, {"units": "given"})

    def _nothing(self) -> None:
        reasons: dict[str, list[str]] = {}
        for f in self.frozen:
            if f.size > 1:
                reasons.setdefault(f.reason, []).append(f.tensor)
        text = "; ".join(f"{why} ({listed(names, 2)})" for why, names in reasons.items())
        raise BudgetError(
            f"nothing can be removed: {text or 'the model has no parameters of two dimensions'}",
            where=type(self.model).__name__,
            remedy="see print(depcut.analyze(model, inputs)); a hidden layer is needed",
        )

    def explain(self, name: str) -> str:
        """Why a layer can or cannot shrink, and with whom.

        Args:
            name: A module or parameter name.

        Raises:
            InputError: The model has no such layer.
        """
        tensors = [
            n
            for n in self.coupling.dims
            if n == name or layer_of(n) == name or n.startswith(name + ".")
        ]
        if not tensors:
            names = sorted({layer_of(n) for n in self.coupling.dims})
            close = difflib.get_close_matches(name, names, 3, 0.4)
            raise InputError(
                f"the model has no layer {name!r} with parameters",
                where="explain",
                remedy=f"did you mean {', '.join(close)}?" if close else f"layers: {listed(names)}",
            )
        lines = [name]
        for tensor in tensors:
            lines += [
                f"  {tensor} dim {dim} ({term.size}): {self._explain_term(term, tensor, dim)}"
                for dim, term in enumerate(self.coupling.dims[tensor])
            ]
        return "\n".join(lines)

    def _explain_term(self, term: axes.Term, tensor: str, dim: int) -> str:
        index, texts = self.coupling.group_of, []
        for leaf in dict.fromkeys(axes.leaves(term)):
            group = index.get(leaf)
            if group is not None:
                others = [layer_of(m.tensor) for m in group.members if m.tensor != tensor]
                others = list(dict.fromkeys(others))
                texts.append(
                    f"group {group.name!r}, {group.size} units"
                    + (f", with {listed(others, 6)}" if others else "")
                    + (f", as many as its tie {group.tied}" if group.tied is not None else "")
                )
        texts += [
            f"frozen: {frozen.reason} [{frozen.where}]"
            for frozen in self.frozen
            if (frozen.tensor, frozen.dim) == (tensor, dim)
        ]
        return "; ".join(texts) or "stays: one index"

    @property
    def frozen_share(self) -> float:
        """Share of the parameters of which no index can be removed."""
        total = stuck = 0
        for name, dims in self.coupling.dims.items():
            if name in self.program.parameters:
                size = math.prod(t.size for t in dims)
                total += size
                stuck += size * all(map(axes.is_frozen, dims))
        return stuck / total if total else 1.0

    def __str__(self) -> str:
        table = Table(title=f"{type(self.model).__name__}: {len(self.groups)} groups")
        for column in ("group", "units", "narrows", "read by", "tie"):
            table.add_column(column, overflow="fold")
        for g in self.groups:
            readers = dict.fromkeys(layer_of(m.tensor) for m in g.members if m.role == "consumer")
            tie = "" if g.tied is None else str(g.tied)
            table.add_row(
                g.name, str(g.size), listed(list(g.layers), 4), listed(list(readers), 4), tie
            )
        reasons: dict[str, int] = {}
        for f in self.frozen:
            reasons[f.reason] = reasons.get(f.reason, 0) + 1
        console = Console(file=StringIO(), width=110)
        console.print(table)
        console.print(
            f"{self.macs:,} MACs, {self.params:,} parameters, {self.frozen_share:.1%} frozen"
        )
        for why, times in sorted(reasons.items(), key=lambda item: -item[1]):
            console.print(f"  frozen: {why} ({times} dimensions)", highlight=False)
        for target, nodes in self.coupling.unknown.items():
            console.print(f"  no working rule: {target} at {listed(nodes, 3)}", highlight=False)
        file: Any = console.file
        return str(file.getvalue()).rstrip()


def analyze(model: nn.Module, inputs: Inputs = None) -> Analysis:
    """Find out what can be removed from a model; it is only read.

    Args:
        model: Any module that torch.export can capture.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; left out, inferred
            from the first layer where that is unambiguous.

    Raises:
        CaptureError: The model cannot be captured.
        InputError: The inputs are of the wrong kind, or cannot be inferred.
    """
    return Analysis(model, infer(capture(model, inputs)))
