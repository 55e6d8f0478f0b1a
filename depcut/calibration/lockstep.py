"""Run the dense and the narrowed graph side by side over all calibration batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn

from depcut.calibration.data import Calibration
from depcut.calibration.reader import Batch
from depcut.graph.interpreter import Paused, Pausing, finished
from depcut.plan.keep import Keep
from depcut.reference.run import Reference


class Lockstep:
    """Both runs of every batch, paused before one node at a time.

    With `low_memory`, only one batch is in memory, and each stop runs it from its start again.

    Args:
        keep: What stays.
        dense: The dense model.
        tensors: The narrowed parameters and buffers by name; they may be changed at stops, and
            what comes later sees the change.
        calibration: The batches.
        stops: Nodes to pause before, in the order of execution.
        shared: Which of the tensors are changed at stops.
    """

    def __init__(
        self,
        keep: Keep,
        dense: nn.Module,
        tensors: dict[str, torch.Tensor],
        calibration: Calibration,
        stops: list[fx.Node],
        shared: Collection[str],
    ) -> None:
        self.calibration, self.tensors, self.stops = calibration, tensors, stops
        self.dense = Reference(Keep(keep.coupling, {}), dense)
        self.slim = Reference(keep, dense, sliced=True)
        self.shared = shared
        self.at = 0
        self.runs: list[tuple[Pausing, Pausing]] = []
        self.paused: list[tuple[Paused, Paused]] = []

    def _start(self, batch: Batch, stops: list[fx.Node]) -> tuple[Pausing, Pausing]:
        leaves, again = self.calibration.leaves(batch), self.calibration.leaves(batch)
        return (
            self.dense.steps(leaves, stops=set(stops)),
            self.slim.steps(again, stops=set(stops), tensors=self._tensors()),
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Those to change as they are; copies of the others, which the model may write to."""
        return {n: t if n in self.shared else t.clone() for n, t in self.tensors.items()}

    def advance(self) -> None:
        """Go on to the next stop."""
        if self.calibration.low_memory:
            self.at += 1
            return
        if not self.runs:
            self.runs = [self._start(b, self.stops) for b in self.calibration.batches]
        self.paused = []
        for dense, slim in self.runs:
            self.paused.append((next(dense), next(slim)))
        self.at += 1

    def steps(self) -> Iterator[tuple[Paused, Paused]]:
        """(dense, narrowed) of each batch at the current stop; can be asked for repeatedly."""
        if not self.calibration.low_memory:
            yield from self.paused
            return
        for batch in self.calibration.batches:
            dense, slim = self._start(batch, [self.stops[self.at - 1]])
            yield next(dense), next(slim)

    def outputs(self, number: int) -> list[Any]:
        """Flat outputs of the narrowed graph for one batch, from the stop on."""
        if self.runs:
            return finished(self.runs[number][1])
        return finished(self._start(self.calibration.batches[number], [])[1])
