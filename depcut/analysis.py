"""What can shrink with what, what cannot and why; and plans made from it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import Any, cast

import networkx as nx
from rich.console import Console
from rich.table import Table
from torch import nn

from depcut import axes
from depcut.allocate.choose import Chooser, Request, check_budget
from depcut.allocate.depth import depth_and_width
from depcut.axes import Indices
from depcut.branches.branch import Branch, Residuals
from depcut.branches.find import residuals
from depcut.calibration.data import BATCHES, Calibration, Data, Loss, calibrate
from depcut.capture.capture import capture
from depcut.capture.inputs import Inputs
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling, Frozen, Group, layer_of
from depcut.coupling.infer import infer
from depcut.deploy.runtime import bind_inputs, resized
from depcut.errors import BudgetError, InputError, listed
from depcut.latency.model import SAMPLES, LatencyModel, latency_model
from depcut.latency.target import Goal, plan_for_latency
from depcut.plan import cost
from depcut.plan.cost import Cost
from depcut.plan.plan import Plan, make_plan
from depcut.scores import Criterion, Score, is_additive


@dataclass(frozen=True, eq=False)
class Analysis:
    """Groups of coupled dimensions of one model.

    Attributes:
        model: The model analysed; it is only read.
        coupling: What inference found.
        inputs: The example inputs as they were given; time is measured on them.
    """

    model: nn.Module
    coupling: Coupling
    inputs: Inputs = None

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
    def residuals(self) -> Residuals:
        """Residual branches, blocks of them, and what looks like a branch and is none, with why."""
        return residuals(self.coupling)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Residual branches that a plan can drop as a whole."""
        return self.residuals.branches

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

    @preserved()
    def plan(
        self,
        ratio: float | None = None,
        *,
        of: str = "macs",
        latency_ms: float | None = None,
        score: str | Score | Criterion | None = None,
        data: Data | Calibration | None = None,
        loss: Loss | None = None,
        batches: int = BATCHES,
        low_memory: bool = False,
        allocation: str | None = None,
        align: int = 8,
        keep: Iterable[str] = (),
        ratios: Mapping[str, float] | None = None,
        seed: int = 0,
        threads: int = 1,
        progress: bool = True,
        depth: bool = False,
    ) -> Plan:
        """Choose the units that stay.

        Args:
            ratio: Fraction removed of the quantity named by `of`, in (0, 1).
            of: "macs", "params", "channels" (every group loses that share) or "latency" (measured
                in onnxruntime on this machine's CPU, see `latency`).
            latency_ms: In place of a ratio: milliseconds to come to, for the inputs as given.
            score: A criterion by name, as `depcut.Score` with options, or as a function of
                (coupling, model, seed); by default "obs" with data and "magnitude" without.
            data: Calibration data: an iterable of what the model takes, or of (input, target).
            loss: A function of (output, target), for criteria that need gradients.
            batches: How many items of the data to read at most.
            low_memory: Whether to trade time for memory.
            allocation: "uniform" (every group loses the same share) or "global" (score per cost);
                by default "global" for latency and for scores that are losses ("obs"), "uniform"
                for all else.
            align: Kept widths are multiples of it where the width allows; 1: any width.
            keep: Globs over module or parameter names whose width must stay.
            ratios: Fraction of units removed, by glob, for groups that the budget does not decide.
            seed: For criteria that draw.
            threads: Threads that one operator may use, where time is measured.
            progress: Whether to show on standard error what is being measured.
            depth: Whether residual branches may be dropped as a whole, see `branches`. How many
                go is decided by how little the outputs change on the example inputs.

        Raises:
            InputError: An option has a wrong value, or a name matches nothing.
            BudgetError: The ratio or time cannot be reached, or nothing can be removed.
            LatencyError: The time cannot be measured.
        """
        of = check_budget(ratio, of, latency_ms, depth)
        if not self.groups:
            self._nothing()
        score = score or ("magnitude" if data is None else "obs")
        if allocation is None:
            allocation = "global" if of == "latency" or is_additive(score) else "uniform"
        calibration = self.calibrate(
            data, loss=loss, batches=batches, low_memory=low_memory, progress=progress
        )
        request = Request(score, allocation, align, keep, ratios or {}, seed, calibration)
        chooser = Chooser(self.coupling, self.model, request)
        if of == "latency":
            goal = Goal(ratio, None if latency_ms is None else 1e-3 * latency_ms)
            times = self.latency(threads=threads, progress=progress)
            return plan_for_latency(
                self.model, self._inputs, chooser, times, goal, progress=progress
            )
        if depth:
            flat = [calibration.leaves(b) for b in calibration.batches] if calibration else ()
            return depth_and_width(chooser, self.residuals, of, cast(float, ratio), flat)
        quantity = self.costs[of]
        counts = chooser.meet(quantity, quantity.total * (1 - cast(float, ratio)), of)
        return chooser.plan(counts, {"ratio": float(cast(float, ratio)), "of": of})

    def calibrate(
        self,
        data: Data | Calibration | None,
        *,
        loss: Loss | None = None,
        batches: int = BATCHES,
        low_memory: bool = False,
        progress: bool = True,
    ) -> Calibration | None:
        """Read and check calibration data once, for `plan` and `Plan.apply`.

        Args:
            data: An iterable of what the model takes, or of (input, target) pairs; None and what
                this function returned before are handed back.
            loss: A function of (output, target) that returns a scalar.
            batches: How many items to read at most.
            low_memory: Whether to trade time for memory.
            progress: Whether to show progress bars on standard error.

        Raises:
            InputError: The data or the loss does not fit the model.
        """
        if data is None:
            return None
        return calibrate(
            self.program,
            self.model,
            data,
            loss=loss,
            batches=batches,
            low_memory=low_memory,
            progress=progress,
        )

    def latency(
        self,
        *,
        threads: int = 1,
        samples: int = SAMPLES,
        refresh: bool = False,
        progress: bool = True,
    ) -> LatencyModel:
        """Time as a function of the kept counts, in onnxruntime on this machine's CPU.

        Takes a minute or more the first time: a number of smaller models are made and profiled.
        What was measured is kept in the user's cache directory.

        Args:
            threads: Threads that one operator may use.
            samples: Models to measure, the dense one among them.
            refresh: Measure again even if there are measurements.
            progress: Whether to show a progress bar on standard error.

        Raises:
            InputError: An argument is out of its range.
            BudgetError: Nothing can be removed.
            LatencyError: The time cannot be measured.
            ExportError: The model cannot be exported or run.
        """
        if not self.groups:
            self._nothing()
        return latency_model(
            self.coupling,
            self.model,
            self._inputs,
            threads=threads,
            samples=samples,
            refresh=refresh,
            progress=progress,
        )

    @property
    def _inputs(self) -> Inputs:
        """The inputs to time: as given, else a single one of those that were inferred."""
        if self.inputs is not None:
            return self.inputs
        given = self.program.kwargs or tuple(self.program.args)
        single = resized(bind_inputs(self.model, given), 1)
        return dict(single.arguments) if single.kwargs else tuple(single.args)

    def plan_keeping(
        self, kept: Mapping[str, Sequence[int] | Indices], dropped: Iterable[str] = ()
    ) -> Plan:
        """A plan from kept units by group name; groups not named keep everything.

        Args:
            kept: Indices that stay.
            dropped: Names of residual branches, or of blocks of them, that go: see `branches`.

        Raises:
            PlanError: Unknown group or branch, impossible units, or unequal counts where they are
                tied.
        """
        return make_plan(self.coupling, self.model, kept, {"units": "given"}, dropped)

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
                    + (f", chosen in each of {group.rows} rows" if group.outer is not None else "")
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
        if self.branches:
            names = listed([b.name for b in self.branches], 4)
            console.print(f"  residual branches (depth=True): {names}", highlight=False)
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
    return Analysis(model, infer(capture(model, inputs)), inputs)
