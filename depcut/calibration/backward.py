"""The walk from the end: all batches differentiated stretch by stretch, whatever the depth.

A first walk, forward, keeps what is alive of each batch at every cut. Then, from the last stretch
to the first, each batch runs once more through a stretch, with gradients, from what is kept; the
derivatives with respect to that are the stretch before's cotangents (Chen et al., Training Deep
Nets with Sublinear Memory Cost, 2016). A graph without cuts runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from depcut.calibration.data import Calibration
from depcut.calibration.shelf import Shelf
from depcut.calibration.store import Store
from depcut.capture.program import Program
from depcut.graph.interpreter import Pausing
from depcut.graph.liveness import storages, written_roots
from depcut.reference.run import Reference, ReferenceRun
from depcut.support.torch_private import pytree

Project = Callable[[int, list[Any], torch.Tensor | None], torch.Tensor]


class Backward:
    """Walks all batches back through the dense graph.

    ```
    for _ in backward.stretches():
        for number, node, run in backward.batches():
            paused = run.paused(node)  # what the stretch shows
    ```

    Args:
        calibration: The batches.
        held: The dense tensors.
        reference: The dense graph, which reads them.
        cuts: Nodes before which stretches end.
        shown: Nodes to pause before.
        readers: Nodes whose results to differentiate with respect to, by the first that reads
            them; of those that only the outputs are, none.
        store: Where to keep what is alive at the cuts.
        project: The number to differentiate, of the number of the batch, the flat outputs and the
            flags of what is no padding.
        take: Gets (node, value, squared derivatives) of every batch.
    """

    def __init__(
        self,
        calibration: Calibration,
        held: Shelf,
        reference: Reference,
        cuts: Sequence[fx.Node],
        shown: Sequence[fx.Node],
        readers: Mapping[fx.Node, Sequence[fx.Node]],
        store: Store,
        project: Project,
        take: Callable[[fx.Node, torch.Tensor, torch.Tensor], None],
    ) -> None:
        self.calibration, self.held, self.reference = calibration, held, reference
        self.program = program = reference.program
        self.cuts, self.shown = list(cuts), set(shown)
        self.store, self.project, self.take = store, project, take
        # What the outputs alone read is seen at the end.
        self.readers = {n: found for n, found in readers.items() if n.op != "output"}
        self.stops = {*cuts, *shown, *self.readers}
        self.weights = Differentiable(held, program.parameters)
        nodes = program.graph.graph.nodes
        self.roots, writes = storages(nodes), written_roots(nodes)
        self.changed = {root for found in writes.values() for root in found}
        self.trained = _trained(program, self.roots, writes)
        self.number = 0
        # At each cut, by node that is alive there: number of the cut at which it was kept.
        self.kept: list[dict[fx.Node, int]] = []
        self.left = len(self.cuts) + 1  # stretches that are to be walked back

    def state(self) -> Any:
        """Where the walk is, at the end of a stretch forward or back."""
        return self.cuts, self.kept, self.left

    def restore(self, state: Any) -> bool:
        """Go on where an earlier process was, with what it had stored, and with its cuts."""
        self.cuts, self.kept, self.left = state
        self.stops = {*self.cuts, *self.shown, *self.readers}
        return True

    def stretches(self, ended: Callable[[], None]) -> Iterator[int]:
        """Go from the last stretch to the first; the number of each.

        Args:
            ended: Called at the end of a stretch, those of the walk forward among them.
        """
        self._forward(ended)
        for number in reversed(range(self.left)):
            self.number = number
            yield number
            self.held.clear()
            self.left = number
            ended()

    def batches(self) -> Iterator[tuple[int, fx.Node, ReferenceRun]]:
        """(number of the batch, node, run paused before it) of the stretch, then differentiate."""
        for number in range(len(self.calibration.batches)):
            run, steps, leaves = self._started(number)
            watched: dict[fx.Node, torch.Tensor] = {}
            outputs: list[Any] | None = None
            while outputs is None:
                try:
                    with torch.enable_grad():
                        node = next(steps).node
                except StopIteration as end:
                    outputs = end.value
                    break
                if node in self._end():
                    break
                if node in self.shown:
                    yield number, node, run
                with torch.enable_grad():
                    for source in self.readers.get(node, ()):
                        _watch(source, run, watched, self.roots[source] in self.changed)
            self._differentiate(number, run, outputs, watched, leaves)
            steps.close()

    def _end(self) -> list[fx.Node]:
        """The node before which the stretch ends, if it is not the last one."""
        return self.cuts[self.number : self.number + 1]

    # Forward -------------------------------------------------------------------------------------

    def _forward(self, ended: Callable[[], None]) -> None:
        """Keep what is alive at every cut."""
        stored: dict[fx.Node, int] = self.kept[-1] if self.kept else {}
        for number in range(len(self.kept), len(self.cuts)):
            self.number = number
            for batch in range(len(self.calibration.batches)):
                with torch.no_grad():
                    run, steps = self._resumed(batch, self._values(batch, number), plain=True)
                    next(steps)
                run.let_go()
                fresh = {n: v for n, v in run.values.items() if not self._is_kept(n, stored)}
                self._keep(batch, number, fresh)
                alive = list(run.values)
                steps.close()
            stored = {n: stored[n] if self._is_kept(n, stored) else number for n in alive}
            self.kept.append(stored)
            self.held.clear()
            ended()

    def _is_kept(self, node: fx.Node, stored: Mapping[fx.Node, int]) -> bool:
        """Whether an earlier cut has a value as it still is."""
        return node in stored and self.roots[node] not in self.changed

    def _keep(self, batch: int, cut: int, values: Mapping[fx.Node, Any]) -> None:
        """Keep values, those that share storage together; a copy of what may be written to."""
        by_root: dict[fx.Node, dict[fx.Node, Any]] = {}
        for node, value in values.items():
            root = self.roots[node]
            own = pytree.tree_map(_copied, value) if root in self.changed else value
            by_root.setdefault(root, {})[node] = own
        for root, found in by_root.items():
            self.store.put((batch, cut, root), found)

    def _values(self, batch: int, stretch: int) -> dict[fx.Node, Any]:
        """What is alive of a batch where a stretch begins."""
        if not stretch:
            return {}
        kept = self.kept[stretch - 1]
        keys = dict.fromkeys((batch, cut, self.roots[node]) for node, cut in kept.items())
        found: dict[fx.Node, Any] = {}
        for key in keys:
            values = self.store.look(key)
            found |= {n: v for n, v in values.items() if kept.get(n) == key[1]}
        return found

    # Backward ------------------------------------------------------------------------------------

    def _resumed(
        self, batch: int, values: Mapping[fx.Node, Any], plain: bool
    ) -> tuple[ReferenceRun, Pausing]:
        """A run of a batch from the beginning of the stretch."""
        run = ReferenceRun(self.reference, tensors=None if plain else self.weights)
        stops = self._end() if plain else self.stops
        given = self.calibration.batches[batch]
        if not self.number:
            return run, run.steps(self.calibration.leaves(given), stops)
        start = self.cuts[self.number - 1]
        return run, run.resumed(start, values, stops, given.resized)

    def _started(
        self, batch: int
    ) -> tuple[ReferenceRun, Pausing, list[tuple[fx.Node, int, torch.Tensor]]]:
        """A run with gradients, its steps, and (node, place in its value, tensor) of its leaves."""
        values: dict[fx.Node, Any] = {}
        leaves: list[tuple[fx.Node, int, torch.Tensor]] = []
        for node, value in self._values(batch, self.number).items():
            parts, spec = pytree.tree_flatten(value)
            for i, part in enumerate(parts):
                if isinstance(part, torch.Tensor) and self.roots[node] in self.changed:
                    parts[i] = part.clone()
                if self.roots[node] in self.trained and _is_float(part):
                    leaf = parts[i].detach().requires_grad_()
                    leaves.append((node, i, leaf))
                    with torch.enable_grad():
                        parts[i] = leaf.clone() if self.roots[node] in self.changed else leaf
            values[node] = pytree.tree_unflatten(parts, spec)
        run, steps = self._resumed(batch, values, plain=False)
        return run, steps, leaves

    def _differentiate(
        self,
        number: int,
        run: ReferenceRun,
        outputs: list[Any] | None,
        watched: dict[fx.Node, torch.Tensor],
        leaves: list[tuple[fx.Node, int, torch.Tensor]],
    ) -> None:
        """Hand on the squared derivatives, and keep those that the stretch before needs."""
        if outputs is not None:
            read = {n for found in self.readers.values() for n in found}
            for node, value in zip(self.program.outputs, outputs, strict=True):
                if _is_float(value) and value.requires_grad and node not in read:
                    watched.setdefault(node, value)
            valid = self.calibration.batches[number].valid
            with torch.enable_grad():
                ends = [self.project(number, self.program.results.of(outputs), valid)]
            cotangents: list[torch.Tensor] | None = None
        else:
            ends, cotangents = self._ends(number, run)
        wanted = {n: v for n, v in watched.items() if v.requires_grad}
        inputs = [*wanted.values(), *(leaf for _, _, leaf in leaves)]
        found: Sequence[torch.Tensor | None] = [None] * len(inputs)
        if ends and inputs:
            found = torch.autograd.grad(ends, inputs, cotangents, allow_unused=True)
        for (node, value), g in zip(wanted.items(), found, strict=False):
            self.take(node, value.detach(), torch.zeros_like(value) if g is None else g.square())
        if self.number:
            given = zip(leaves, found[len(wanted) :], strict=True)
            back = {(n, i): g for (n, i, _), g in given if g is not None}
            self.store.put((number, "cotangents"), back)
            for root in dict.fromkeys(self.roots[n] for n in self.kept[self.number - 1]):
                self.store.drop((number, self.number - 1, root))

    def _ends(
        self, number: int, run: ReferenceRun
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What is alive at the end of the stretch, with the derivatives with respect to it."""
        ends, cotangents = [], []
        for (node, place), g in self.store.take((number, "cotangents")).items():
            value = pytree.tree_leaves(run.values[node])[place]
            if value.requires_grad:
                ends.append(value)
                cotangents.append(g)
        return ends, cotangents


class Differentiable(Mapping[str, torch.Tensor]):
    """Tensors by name, the floating-point parameters among them to be differentiated through.

    Args:
        held: The tensors.
        parameters: Names of those that are parameters.
    """

    def __init__(self, held: Mapping[str, torch.Tensor], parameters: frozenset[str]) -> None:
        self._held, self._parameters = held, parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._held[name].detach()
        return tensor.requires_grad_(tensor.is_floating_point())

    def __contains__(self, name: object) -> bool:
        return name in self._parameters and name in self._held

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._held if name in self._parameters)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _trained(
    program: Program, roots: Mapping[fx.Node, fx.Node], writes: Mapping[fx.Node, Sequence[fx.Node]]
) -> set[fx.Node]:
    """Nodes whose storage holds what depends on parameters, of those that made a storage."""
    out = {n for n, name in program.tensors.items() if name in program.parameters}
    for node in program.graph.graph.nodes:
        if any(roots[source] in out for source in node.all_input_nodes):
            out |= {roots[node], *writes[node]}
    return out


def _watch(
    node: fx.Node, run: ReferenceRun, watched: dict[fx.Node, torch.Tensor], changed: bool
) -> None:
    """Note a value before it is first read.

    Args:
        node: Whose value.
        run: The run that has it.
        watched: Where to note it.
        changed: Whether what follows works on it in place; on a copy then.
    """
    value = run.values[node]
    watched[node] = value[0] if isinstance(value, list | tuple) else value
    if changed and not isinstance(value, list | tuple):
        run.values[node] = value.clone()


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
