"""The walk: all batches through captured graphs, stretch by stretch, one of them at a time.

A stretch ends at a node before which every batch pauses. Between stretches, what is alive of each
batch there is kept in a store; weights are not among it, but asked for again. So the memory taken
is that of one stretch of one batch, and what the store may hold; every graph runs once, whatever
its depth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from depcut.calibration.data import Calibration
from depcut.calibration.shelf import Shelf
from depcut.calibration.store import Store
from depcut.graph.interpreter import Pausing, finished
from depcut.graph.rereadable import names_read
from depcut.graph.resized import numbers_of_run
from depcut.reference.run import Reference, ReferenceRun, Tensors

_AHEAD = 8  # what is computed ahead of all batches takes at most the budget divided by it


@dataclass(frozen=True)
class Graph:
    """One of the graphs that batches are walked through.

    Attributes:
        reference: What runs.
        tensors: Parameters and buffers to use in place of the reference's own, by name; may change
            between stretches.
    """

    reference: Reference
    tensors: Tensors | None = None

    def started(
        self, leaves: list[Any], stops: Collection[fx.Node]
    ) -> tuple[ReferenceRun, Pausing]:
        """A run on a batch, and its steps."""
        self.reference.check(leaves)
        run = ReferenceRun(self.reference, tensors=self.tensors)
        return run, run.steps(leaves, stops)

    def followed(
        self,
        leaves: list[Any],
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        stops: Collection[fx.Node],
    ) -> tuple[ReferenceRun, Pausing]:
        """A run that pauses before a node with the values that another one had there."""
        self.reference.check(leaves)
        run = ReferenceRun(self.reference, tensors=self.tensors)
        run.shapes = [v.shape if isinstance(v, torch.Tensor) else None for v in leaves]
        steps = run.resumed(node, values, stops, numbers_of_run(leaves))
        next(steps)
        return run, steps


@dataclass
class _Walker:
    """One batch on its way.

    Attributes:
        runs: Its run of each graph.
        steps: Of each run.
        at: Number of the pauses that it has come to.
    """

    runs: tuple[ReferenceRun, ...]
    steps: tuple[Pausing, ...]
    at: int = 0


class Walk:
    """Walks all batches through graphs from pause to pause.

    ```
    with Store(budget) as store:
        walk = Walk(calibration, [Graph(dense), Graph(slim, tensors)], stretches, store)
        for stretch in walk.stretches():
            for number, node, (dense, slim) in walk.batches():
                paused = dense.paused(node)  # arguments and values, for as long as the pause lasts
    ```

    Args:
        calibration: The batches.
        graphs: What to walk them through, in step.
        stretches: The nodes to pause before, in the order of execution; after the last one of a
            stretch a batch is put into the store, and the next one follows.
        store: Where to keep what is alive between stretches.
        shelves: Of tensors that live elsewhere; cleared after every stretch, but for what the nodes
            read that come next.
        together: Further nodes that are looked at before the last one of a stretch.
    """

    def __init__(
        self,
        calibration: Calibration,
        graphs: Sequence[Graph],
        stretches: Sequence[Sequence[fx.Node]],
        store: Store,
        shelves: Sequence[Shelf] = (),
        together: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
    ) -> None:
        self.calibration, self.graphs, self.store = calibration, graphs, store
        self.together = together
        self.shelves, self.stops = shelves, {node for stretch in stretches for node in stretch}
        self.pauses = [tuple(stretch) for stretch in stretches if stretch]
        self.nodes = [node for stretch in self.pauses for node in stretch]
        self.ends = list(accumulate(map(len, self.pauses)))
        self.walkers: dict[int, _Walker] = {}
        self.number = 0  # of the stretch
        self.done = 0  # stretches that an earlier process has walked
        self.resident: int | None = None  # the batch whose values are not in the store

    def stretches(self) -> Iterator[tuple[fx.Node, ...]]:
        """Go from stretch to stretch; each one's nodes."""
        for number, stretch in enumerate(self.pauses):
            if number < self.done:
                continue
            self.number = number
            yield stretch
            self._let_go()
            following = (self.together or {}).get(stretch[-1], ())
            names = names_read((stretch[-1], *following), self.graphs[0].reference.program)
            for shelf in self.shelves:
                shelf.clear(but=names)

    def batches(self) -> Iterator[tuple[int, fx.Node, tuple[ReferenceRun, ...]]]:
        """(number of the batch, node, runs paused before it), batch by batch, of the stretch.

        Can be asked for again, which shows the last node of the stretch alone.
        """
        for number in range(len(self.calibration.batches)):
            walker = self._entered(number)
            if walker.at == self.ends[self.number]:
                yield number, self.nodes[walker.at - 1], walker.runs
            while walker.at < self.ends[self.number]:
                self._advance(walker)
                yield number, self.nodes[walker.at - 1], walker.runs
            self._let_go()

    def state(self) -> int:
        """How many stretches are walked, at the end of one; all batches are in the store then."""
        if self.resident is not None:
            self._let_go()
            self._leave(self.resident)
            self.resident = None
        return self.number + 1

    def restore(self, state: Any) -> bool:
        """Go on behind stretches that an earlier process has walked, with what it had stored."""
        self.done = int(state)
        self.number = self.done - 1
        return True

    def outputs(self, number: int, graph: int) -> list[Any]:
        """Flat outputs of one graph for one batch, from where it is; it cannot be walked on.

        Args:
            number: Of the batch.
            graph: Its place among the graphs.
        """
        self._entered(number)
        self.resident = None
        with torch.no_grad():
            return finished(self.walkers.pop(number).steps[graph])

    def _entered(self, number: int) -> _Walker:
        """A batch with its values; those of the one before are in the store."""
        if self.resident == number:
            return self.walkers[number]
        if self.resident is not None:
            self._let_go()
            self._leave(self.resident)
        self.resident = number
        if number not in self.walkers and number in self.store:
            self.walkers[number] = self._followed(number)
        elif number not in self.walkers:
            batch = self.calibration.batches[number]
            started = [g.started(self.calibration.leaves(batch), self.stops) for g in self.graphs]
            runs, steps = zip(*started, strict=True)
            self._give_room(runs)
            self.walkers[number] = _Walker(runs, steps)
        elif number in self.store:
            walker = self.walkers[number]
            for run, values in zip(walker.runs, self.store.take(number), strict=True):
                run.values.update(values)
        self.store.read_ahead(number + 1)
        return self.walkers[number]

    def _leave(self, number: int) -> None:
        """Put the values of a batch into the store."""
        runs = self.walkers[number].runs
        self.store.put(number, [dict(run.values) for run in runs])
        for run in runs:
            run.values.clear()

    def _followed(self, number: int) -> _Walker:
        """A batch where an earlier process has left it."""
        at, batch = self.ends[self.done - 1], self.calibration.batches[number]
        leaves = self.calibration.leaves(batch)
        graphs = zip(self.graphs, self.store.take(number), strict=True)
        steps = [g.followed(leaves, self.nodes[at - 1], v, self.stops) for g, v in graphs]
        runs, pausing = zip(*steps, strict=True)
        self._give_room(runs)
        return _Walker(runs, pausing, at)

    def _give_room(self, runs: Sequence[ReferenceRun]) -> None:
        """Allow the runs of a batch to keep some of what they compute ahead."""
        for run in runs:
            run.room = self.store.budget // (_AHEAD * len(self.calibration.batches))

    def _advance(self, walker: _Walker) -> None:
        with torch.no_grad():
            for steps in walker.steps:
                next(steps)
        walker.at += 1

    def _let_go(self) -> None:
        """Hold none of the weights that can be asked for again."""
        if self.resident is not None:
            for run in self.walkers[self.resident].runs:
                run.let_go()
