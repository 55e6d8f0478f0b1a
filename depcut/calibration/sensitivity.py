"""Squared derivatives of the outputs with respect to node results, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import fx, nn

from depcut.calibration.data import Calibration
from depcut.calibration.progress import ticking
from depcut.calibration.reader import Batch
from depcut.coupling.groups import Coupling
from depcut.plan.keep import Keep
from depcut.reference.run import Reference

_TINY = 1e-30


def sensitivities(
    coupling: Coupling,
    model: nn.Module,
    calibration: Calibration,
    features: Mapping[fx.Node, int | None],
) -> dict[fx.Node, torch.Tensor]:
    """Mean squared derivative of the outputs with respect to what nodes compute.

    With v of random signs and z the outputs, each scaled to unit variance, E[(d v^T z / dy)^2] is
    the sum over all outputs of (dz/dy)^2 (Hutchinson 1990), the diagonal of the Gauss-Newton matrix
    of a squared loss between the outputs of two models. No targets are needed. Every batch is read
    once: one forward and one backward pass.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.
        calibration: The batches; one probe each.
        features: The nodes, each with the dimension of its features (negative), or None where an
            error in it is only known as a share of its variance.

    Returns:
        For each node, in double precision: by feature, the sum of squared derivatives over all
        else in a batch; or the one number of which that share of the variance counts. An error
        times that is the share of the outputs' variance that it costs, to first order. Empty if
        the graph cannot be differentiated.
    """
    order = {node: i for i, node in enumerate(coupling.program.graph.graph.nodes)}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in features:
        if node.users:
            readers.setdefault(min(node.users, key=lambda n: order[n]), []).append(node)
    probe = _Probe(coupling, model, calibration, readers)
    total: dict[fx.Node, torch.Tensor] = {}
    try:
        for number, batch in zip(
            calibration.numbers, ticking(calibration, "sensitivity"), strict=True
        ):
            generator = torch.Generator().manual_seed(number)
            for node, squares in probe.squares(batch, generator).items():
                if node not in features:
                    continue
                part = _by_feature(*squares, features[node])
                total[node] = total[node] + part if node in total else part
        known = True
    except RuntimeError:
        # An operator without a derivative: nothing is known, all errors count alike.
        known = False
    everyone = calibration.everyone
    if any(everyone.any_of("derivatives", [not known])):
        return {}
    sums = everyone.summed("sensitivities", list(total.values()))
    return {node: value / calibration.total for node, value in zip(total, sums, strict=True)}


class _Probe:
    """Runs the graph once a batch and differentiates a random projection of its outputs."""

    def __init__(
        self,
        coupling: Coupling,
        model: nn.Module,
        calibration: Calibration,
        readers: dict[fx.Node, list[fx.Node]],
    ) -> None:
        self.reference = Reference(Keep(coupling, {}), model)
        self.program, self.calibration, self.readers = coupling.program, calibration, readers
        held = self.reference.held
        self.weights = {
            name: held[name].detach().requires_grad_(True)
            for name in self.program.parameters
            if name in held and held[name].is_floating_point()
        }

    def squares(
        self, batch: Batch, generator: torch.Generator
    ) -> dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]:
        """(values, squared derivatives) of what each node computes."""
        watched: dict[fx.Node, torch.Tensor] = {}
        steps = self.reference.steps(
            self.calibration.leaves(batch), stops=set(self.readers), tensors=self.weights
        )
        outputs: list[Any] = []
        with torch.enable_grad():
            try:
                while True:
                    paused = next(steps)
                    for node in self.readers[paused.node]:
                        self._watch(node, paused.values, watched)
            except StopIteration as end:
                outputs = end.value
            for node, value in zip(self.program.outputs, outputs, strict=True):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    watched.setdefault(node, value)
            counted = self.program.results.of(outputs)
            scalar = self._projection(counted, generator, batch.valid)
        wanted = {n: v for n, v in watched.items() if v.requires_grad}
        gradients = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
        return {
            node: (value.detach(), torch.zeros_like(value) if g is None else g.square())
            for (node, value), g in zip(wanted.items(), gradients, strict=True)
        }

    def _watch(
        self,
        node: fx.Node,
        values: MutableMapping[fx.Node, Any],
        watched: dict[fx.Node, torch.Tensor],
    ) -> None:
        value = values[node]
        if isinstance(value, list | tuple):
            watched[node] = value[0]
        else:
            # What follows may work in place, on the copy then.
            watched[node] = value
            values[node] = value.clone()

    def _projection(
        self, outputs: list[Any], generator: torch.Generator, valid: torch.Tensor | None
    ) -> torch.Tensor:
        total = torch.zeros((), device=self.calibration.device)
        values = [v for v in outputs if isinstance(v, torch.Tensor) and v.requires_grad]
        # A loss beside the outputs has no variance; it counts where it is all there is.
        for value in [v for v in values if v.numel() > 1] or values:
            signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
            if valid is not None and value.shape[:2] == valid.shape:
                signs = signs * valid.cpu().reshape(*valid.shape, *[1] * (value.ndim - 2))
            scale = float(value.detach().double().var(unbiased=False)) * value.numel() + _TINY
            total = total + (value * signs.to(value)).sum() / scale**0.5
        return total


def _by_feature(value: torch.Tensor, squares: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Sum over everything but the features; without such, weighted by the variance."""
    if dim is None:
        flat = value.double().flatten(0, -2)
        return ((flat - flat.mean(0)).square() * squares.double().flatten(0, -2)).sum()
    return squares.double().movedim(dim, -1).flatten(0, -2).sum(0)
