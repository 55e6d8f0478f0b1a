"""Running statistics of a batch norm, moved as the calibration batches' own have moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from depcut.calibration.shelf import Shelf
from depcut.graph.arguments import bound
from depcut.graph.interpreter import Paused
from depcut.ops.normalization import shared_statistics
from depcut.plan.keep import Keep
from depcut.support.processes import ALONE, Processes


@dataclass
class _Spread:
    """Mean and sum of squared deviations by channel, taken in batch by batch.

    Source: Chan, Golub & LeVeque, Updating Formulae and a Pairwise Algorithm, 1979.
    """

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    @staticmethod
    def of(value: torch.Tensor) -> _Spread:
        """Of values [batch, channels, ...], less their mean summed in their own precision."""
        dims = [d for d in range(value.ndim) if d != 1]
        exact = value.to(torch.promote_types(value.dtype, torch.float32))
        near, count = exact.mean(dims, keepdim=True), value.numel() // value.shape[1]
        rest = exact - near
        left = rest.sum(dims).double() / count
        squares = rest.square_().sum(dims).double() - count * left.square()
        return _Spread(count, near.flatten().double() + left, squares.clamp_min(0))

    def __add__(self, other: _Spread) -> _Spread:
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart.square() * (self.count * other.count / count)
        return _Spread(count, mean, self.squares + other.squares + between)

    def over_processes(self, label: str, everyone: Processes) -> _Spread:
        """Of the values of all processes."""
        if everyone.size == 1:
            return self
        numbers = torch.tensor(self.count, dtype=torch.float64)
        count, total = everyone.summed(label, [numbers, self.mean * self.count])
        mean = total / count.to(total.device)
        between = (self.mean - mean).square() * self.count
        (squares,) = everyone.summed(label, [self.squares + between])
        return _Spread(int(count), mean, squares)

    @property
    def variance(self) -> torch.Tensor:
        return self.squares / self.count


def statistics(norm: fx.Node, keep: Keep, tensors: Shelf) -> tuple[str, ...]:
    """Names of a batch norm's running mean and variance, where they can be changed.

    Args:
        norm: Its node.
        keep: What stays.
        tensors: The narrowed tensors.
    """
    program = keep.coupling.program
    found = [program.tensors.get(n) for n in norm.args[3:5] if isinstance(n, fx.Node)]
    names = tuple(n for n in found if n is not None and n in tensors)
    movable = shared_statistics(norm, program) is None and isinstance(
        keep.coupling.env[norm], tuple
    )
    return names if len(names) == 2 and movable else ()


class NormRepair:
    """Shifts and scales the running statistics of one batch norm, once it has seen every batch.

    Args:
        norm: Its node; it has statistics that can be changed.
        keep: What stays.
        tensors: The narrowed tensors, which are changed.
        everyone: The processes that see batches.
    """

    again = False

    def __init__(
        self, norm: fx.Node, keep: Keep, tensors: Shelf, everyone: Processes = ALONE
    ) -> None:
        self.everyone = everyone
        self.node, self.keep, self.tensors = norm, keep, tensors
        self.spreads: list[_Spread] = []

    def see(self, number: int, dense: Paused, slim: Paused) -> None:  # noqa: ARG002  (as a site)
        """Take in one batch, as the dense and the narrowed graph show it."""
        calls = [bound(p.node, p.args, p.kwargs) for p in (dense, slim)]
        found = [_Spread.of(call["input"]) for call in calls]
        before = self.spreads
        self.spreads = [a + b for a, b in zip(before, found, strict=True)] if before else found

    def finish(self, dense: Paused, slim: Paused) -> None:  # noqa: ARG002  (as a site)
        """Change the statistics."""
        dims = self.keep.coupling.env[self.node]
        assert isinstance(dims, tuple)
        label = f"statistics of {self.node.name}"
        before, after = (s.over_processes(label, self.everyone) for s in self.spreads)
        kept = self.keep.indices(dims[1])
        old = [before.mean, before.variance]
        if kept is not None:
            old = [b[torch.from_numpy(kept).to(b.device)] for b in old]
        names = statistics(self.node, self.keep, self.tensors)
        mean, variance = (self.tensors[name] for name in names)
        mean += (after.mean - old[0]).to(mean.dtype)
        # Its epsilon tells noise from variance here too.
        eps = bound(slim.node, slim.args, slim.kwargs)["eps"]
        ratio = ((after.variance + eps) / (old[1] + eps)).clamp(1e-2, 1e2)
        variance *= ratio.to(variance.dtype)
        for name in names:
            self.tensors.hand_back(name)
