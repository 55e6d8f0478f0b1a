"""Squared derivatives of the outputs with respect to node results, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch
from torch import fx, nn

from depcut.calibration.backward import Backward
from depcut.calibration.cuts import bytes_of, cut, weights_of
from depcut.calibration.data import Calibration
from depcut.calibration.progress import bar
from depcut.calibration.shelf import Shelf
from depcut.calibration.store import Store
from depcut.calibration.trail import Part
from depcut.calibration.visits import STRETCHES, checked_call
from depcut.capture.held import held_tensors
from depcut.coupling.groups import Coupling
from depcut.graph.arguments import Call
from depcut.graph.liveness import storages
from depcut.graph.rereadable import rereadable
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, Tensors

_TINY = 1e-30
_PART = 2**21  # numbers

Features = int | tuple[int, ...] | None


def sensitivities(
    coupling: Coupling,
    model: nn.Module | Tensors,
    calibration: Calibration,
    features: Mapping[fx.Node, Features],
) -> dict[fx.Node, torch.Tensor]:
    """Mean squared derivative of the outputs with respect to what nodes compute.

    With v of random signs and z the outputs, each scaled to unit variance, E[(d v^T z / dy)^2] is
    the sum over all outputs of (dz/dy)^2 (Hutchinson 1990), the diagonal of the Gauss-Newton matrix
    of a squared loss between the outputs of two models. No targets are needed. Every batch runs
    forward and backward once; and, where that takes several stretches, forward once before.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.
        calibration: The batches; one probe each.
        features: The nodes, each with the dimension of its features (negative), or None where an
            error in it is only known as a share of its variance; or several such dimensions, where
            it is the share that deviates from the mean over all others.

    Returns:
        For each node, in double precision: by feature, the sum of squared derivatives over all
        else in a batch; or the one number of which that share of the variance counts. An error
        times that is the share of the outputs' variance that it costs, to first order. Empty if
        the graph cannot be differentiated.
    """
    felt = Sensitivity(coupling, model, calibration, features)
    try:
        with closing(felt.walked()) as walk:
            for _ in walk:
                pass
    except NoDerivativeError:
        return {}
    felt.sum_over_processes(list(felt.found))
    return felt.found


class Looking(Part, Protocol):
    """Who is shown nodes, and has a state between two stretches."""

    @property
    def stores(self) -> Sequence[Store]:
        """What it keeps values in."""


class NoDerivativeError(Exception):
    """The graph cannot be differentiated: nothing is known, all errors count alike."""


class Sensitivity:
    """Sensitivities in the making, from the last stretch of a walk back to the first.

    Args:
        coupling: The analysed model.
        model: The model, or its tensors by name; only read.
        calibration: The batches.
        features: See `sensitivities`.

    Attributes:
        found: By node, of those in the stretches that are done; see `sensitivities`.
    """

    def __init__(
        self,
        coupling: Coupling,
        model: nn.Module | Tensors,
        calibration: Calibration,
        features: Mapping[fx.Node, Features],
    ) -> None:
        self.coupling, self.model, self.calibration = coupling, model, calibration
        self.features = features
        self.found: dict[fx.Node, torch.Tensor] = {}

    def state(self) -> Any:
        """What was found so far."""
        return dict(self.found)

    def restore(self, state: Any) -> bool:
        """Have what an earlier process has found."""
        self.found.update(state)
        return True

    def walked(
        self, shown: Mapping[fx.Node, int] | None = None, looking: Looking | None = None
    ) -> Generator[tuple[int, fx.Node, Call] | None]:
        """Walk back over the data; to be closed.

        Args:
            shown: Nodes to show, with the bytes that the caller takes for each until the end of
                its stretch.
            looking: The caller, where a process that is killed is to be followed by another.

        Yields:
            (number of the batch, node, values of its arguments) whenever a node is shown; None at
            the end of a stretch.

        Raises:
            NoDerivativeError: An operator has no derivative.
            InputError: The model turns the data into NaN or infinite values.
        """
        program, calibration, shown = self.coupling.program, self.calibration, shown or {}
        model = self.model
        held = Shelf(held_tensors(model) if isinstance(model, nn.Module) else model)
        cuts = self.cuts(shown)
        trail = calibration.trail if looking is not None else None
        with Store(calibration.memory, trail) as store, bar(calibration) as progress:
            back = Backward(
                calibration,
                held,
                Reference(Keep(self.coupling, {}), held),
                cuts,
                list(shown),
                self._readers(),
                store,
                self._projection,
                self._take,
            )
            ended = _nothing
            if trail is not None and looking is not None:
                parts: dict[str, Part] = {"walk": back, "found": self, "looking": looking}
                ended = trail.following("sensitivity", program, [store, *looking.stores], parts)
            try:
                stretches = back.stretches(ended)
                for _ in progress.track(stretches, back.left, description="sensitivity"):
                    for number, node, run in back.batches():
                        paused = run.paused(node)
                        yield number, node, checked_call(paused, calibration.numbers[number])
                    yield None
            except RuntimeError as error:
                raise NoDerivativeError from error

    def cuts(self, shown: Mapping[fx.Node, int]) -> list[fx.Node]:
        """Where the walk pauses, so that a stretch is within a part of the memory.

        Args:
            shown: See `walked`.
        """
        program, calibration = self.coupling.program, self.calibration
        # Stretches are the same in all processes.
        most = calibration.everyone.exchanged("rows", max(b.rows for b in calibration.batches))
        rows = max(most) / max(program.batch, 1)
        asked = rereadable(program)
        cost = {n: shown.get(n, 0) for n in program.graph.graph.nodes}
        for node, root in storages(cost).items():
            cost[node] += int(rows * bytes_of(node)) if root is node and node not in asked else 0
        if not isinstance(self.model, nn.Module):
            for node, nbytes in weights_of(program).items():
                cost[node] += nbytes
        return cut(program, cost, calibration.memory // STRETCHES, apart=True)

    def sum_over_processes(self, nodes: Iterable[fx.Node]) -> None:
        """Take in what the other processes have found of nodes, once a node.

        Args:
            nodes: The same in all processes.
        """
        known = [node for node in nodes if node in self.found]
        sums = self.calibration.everyone.summed("sensitivities", [self.found[n] for n in known])
        self.found.update(zip(known, sums, strict=True))

    def _readers(self) -> dict[fx.Node, list[fx.Node]]:
        """The nodes to know the sensitivity of, by the first that reads each."""
        order = {node: i for i, node in enumerate(self.coupling.program.graph.graph.nodes)}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.features:
            if node.users:
                readers.setdefault(min(node.users, key=lambda n: order[n]), []).append(node)
        return readers

    def _take(self, node: fx.Node, value: torch.Tensor, squares: torch.Tensor) -> None:
        """Take in what one batch shows of one node."""
        if node not in self.features:
            return
        part = _by_feature(value, squares, self.features[node]) / self.calibration.total
        self.found[node] = self.found[node] + part if node in self.found else part

    def _projection(
        self, number: int, outputs: list[Any], valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Outputs with random signs, each scaled to unit variance, summed up."""
        # Of the batch, whichever process has it.
        generator = torch.Generator().manual_seed(self.calibration.numbers[number])
        total = torch.zeros((), device=self.calibration.device)
        values = [v for v in outputs if isinstance(v, torch.Tensor) and v.requires_grad]
        # A loss beside the outputs has no variance; it counts where it is all there is.
        for value in [v for v in values if v.numel() > 1] or values:
            # Whole numbers of any size are the same draws.
            signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8)
            signs.mul_(2).sub_(1)
            if valid is not None and value.shape[:2] == valid.shape:
                signs = signs * valid.cpu().reshape(*valid.shape, *[1] * (value.ndim - 2))
            scale = _spread(value.detach()) + _TINY
            total = total + (value * signs.to(value)).sum() / scale**0.5
        return total


def _nothing() -> None:
    """At the end of a stretch."""


def _spread(value: torch.Tensor) -> float:
    """Sum of squares about the mean, in double precision, of which a part is held at a time."""
    parts = value.flatten().split(_PART)
    mean = sum(float(part.double().sum()) for part in parts) / value.numel()
    return sum(float((part.double() - mean).square_().sum()) for part in parts)


def _by_feature(value: torch.Tensor, squares: torch.Tensor, dim: Features) -> torch.Tensor:
    """Sum over everything but the features; without one, weighted by the variance."""
    # Sums of what is not negative: in single precision, torch's lose few bits.
    exact = torch.promote_types(squares.dtype, torch.float32)
    if dim is None:
        dim = (-1,)
    if isinstance(dim, tuple):
        means = [d for d in range(value.ndim) if d - value.ndim not in dim]
        same = value.to(exact)
        same = same - same.mean(means, keepdim=True) if means else torch.zeros_like(same)
        return (same.square_() * squares).sum().double()
    others = [d for d in range(squares.ndim) if d != dim % squares.ndim]
    return (squares.sum(others, dtype=exact) if others else squares).double()
