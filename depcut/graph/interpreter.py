"""One run of a captured graph, node by node: what every run shares, whatever its values are."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import fx

from depcut.capture.program import Program
from depcut.graph.arguments import values_of
from depcut.graph.operators import enters_autocast, in_any_layout, leaves_autocast
from depcut.graph.rereadable import rereadable
from depcut.graph.resized import Resized, numbers_of_run


class Paused:
    """A node about to run; what it shows is asked for when it is looked at, during the pause.

    Args:
        run: The run that pauses.
        node: The node.

    Attributes:
        node: The node.
    """

    def __init__(self, run: Interpreter, node: fx.Node) -> None:
        self.node, self._run = node, run

    @property
    def values(self) -> MutableMapping[fx.Node, Any]:
        """Of all that is still needed, the node's arguments among them."""
        return self._run.with_sources(self.node)

    @property
    def args(self) -> tuple[Any, ...]:
        """Values of the positional arguments."""
        return self._given[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Values of the keyword arguments."""
        return self._given[1]

    def result(self) -> Any:
        """The node's value, computed ahead; None in an autocast region."""
        return self._run.ahead(self.node)

    @cached_property
    def _given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._run.with_sources(self.node)
        return self._run.arguments(self.node)


Pausing = Generator[Paused, None, list[Any]]  # a run that stops before some nodes: flat outputs


def finished(run: Pausing) -> list[Any]:
    """Run to the end what may have paused; the flat outputs."""
    try:
        while True:
            next(run)
    except StopIteration as end:
        return list(end.value)


def last_uses(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose value nobody needs after a node; itself, where nobody needs it at all."""
    return program.once(_last_uses)


def _last_uses(program: Program) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        out.setdefault(node, []).append(source)
    return out


class Interpreter:
    """One run of a captured graph. A subclass says what the values are.

    A value is freed when its last reader has run. Tensors of the model, and views of them, are
    asked for when a node first reads them, and once more after `let_go`. While the run pauses, and
    once it has ended in whatever way, the thread is outside of the graph's autocast regions.

    Args:
        program: The captured graph.

    Attributes:
        values: Of the nodes that ran and are still needed.
        resized: The numbers of a run on inputs of other sizes than the captured ones.
        rereadable: Nodes whose values can be asked for again.
        room: Bytes of values computed ahead that are kept, so that they are not computed again.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[fx.Node, Any] = {}
        self.resized: Resized | None = None
        self.rereadable = rereadable(program)
        self.room = 0
        self._ahead: dict[fx.Node, int] = {}
        self._regions: list[torch.autocast] = []
        self._paused_in = False  # an autocast region

    # What a subclass says ------------------------------------------------------------------------

    def tensor(self, node: fx.Node, name: str) -> Any:
        """The value of a parameter, buffer or constant.

        Args:
            node: Its placeholder.
            name: Its qualified name.
        """
        raise NotImplementedError

    def given(self, node: fx.Node, value: Any) -> Any:  # noqa: ARG002  (a hook)
        """The value of an input, as the caller gave it."""
        return value

    def constant(self, node: fx.Node) -> Any:
        """The value of an attribute of the graph."""
        if self.resized is not None:
            return self.resized.constants[node]
        return getattr(self.program.graph, str(node.target))

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) that a paused run shows."""
        return self.values_of(node, self.values)

    def values_of(
        self, node: fx.Node, values: Mapping[fx.Node, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) of a node with values in place of nodes."""
        if self.resized is None:
            return values_of(node, values)
        args, kwargs = fx.map_arg(self.resized.arguments_of(node), values.__getitem__)
        return tuple(args), dict(kwargs)

    def stands_aside(self, node: fx.Node) -> bool:  # noqa: ARG002  (a hook)
        """Whether a node is not run; its value, if it needs one, has been set then."""
        return False

    def call(self, node: fx.Node) -> Any:
        """The value of an operator's node."""
        args, kwargs = self.values_of(node, self.values)
        return in_any_layout(node.target)(*args, **kwargs)

    def made(self, node: fx.Node) -> None:
        """Called when a node has its value, before what it was the last to read is freed."""

    def free(self, node: fx.Node) -> None:
        """Forget a value that nobody needs any more."""
        self.values.pop(node, None)

    # What all runs do ----------------------------------------------------------------------------

    def paused(self, node: fx.Node) -> Paused:
        """A node whose arguments are known while the run pauses."""
        return Paused(self, node)

    def with_sources(self, node: fx.Node) -> dict[fx.Node, Any]:
        """The values, what a node reads and can be asked for again among them."""
        self._ask_for_sources(node)
        return self.values

    def let_go(self) -> None:
        """While the run pauses: forget the values that can be asked for again."""
        for node in self.rereadable.intersection(self.values):
            del self.values[node]

    def ahead(self, node: fx.Node) -> Any:
        """While the run pauses: the value of a node whose arguments are known, None in autocast."""
        if self._paused_in:
            return None
        if node in self._ahead:
            return self.values[node]
        self._ask_for_sources(node)
        with torch.no_grad():
            value = self.call(node)
        nbytes = value.nbytes if isinstance(value, torch.Tensor) else self.room + 1
        if sum(self._ahead.values()) + nbytes <= self.room:
            self._ahead[node], self.values[node] = nbytes, value
        return value

    def _ask_for_sources(self, node: fx.Node) -> None:
        """Have the values that a node reads and that can be asked for again."""
        for source in node.all_input_nodes:
            if source not in self.values and source in self.rereadable:
                self._ask_for(source)

    def _ask_for(self, node: fx.Node) -> None:
        """Have one of the values that can be asked for again."""
        if node.op == "placeholder":
            self.values[node] = self.tensor(node, self.program.tensors[node])
        elif node.op == "get_attr":
            self.values[node] = self.constant(node)
        else:
            asked = [s for s in node.all_input_nodes if s not in self.values]
            self._ask_for_sources(node)
            if not self.stands_aside(node):
                self.values[node] = self.call(node)
            for source in asked:  # the last reader of the others is yet to come
                self.values.pop(source, None)

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return finished(self.steps(inputs))

    def steps(self, inputs: Sequence[Any], stops: Collection[fx.Node] = ()) -> Pausing:
        """Run node by node, pausing before some of them.

        Args:
            inputs: Flat inputs; of other sizes than the captured ones as `FlatInputs`.
            stops: Nodes to pause before; what their arguments are views of may be changed then.

        Returns:
            The flat outputs.
        """
        pending = deque(inputs)
        self.resized = numbers_of_run(inputs)
        del inputs  # a pause may be long, and what is still read of them is among the values
        self.values.clear()
        first: fx.Node = next(iter(self.program.graph.graph.nodes))
        return (yield from self._from(first, stops, pending))

    def resumed(
        self,
        start: fx.Node,
        values: Mapping[fx.Node, Any],
        stops: Collection[fx.Node] = (),
        resized: Resized | None = None,
    ) -> Pausing:
        """Run from where another run paused, and after that as `steps` does.

        Args:
            start: The node that it paused before.
            values: What it had then, but for what can be asked for again.
            stops: Nodes to pause before.
            resized: The numbers of inputs of other sizes.

        Returns:
            The flat outputs.
        """
        self.resized = resized
        self.values.clear()
        self.values.update(values)
        for node in sorted(filter(enters_autocast, values)):
            self.values[node].__enter__()
            self._regions.append(self.values[node])
        return (yield from self._from(start, stops, deque()))

    def _from(self, node: fx.Node, stops: Collection[fx.Node], pending: deque[Any]) -> Pausing:
        """Run from a node on."""
        last, outputs = last_uses(self.program), list[Any]()
        try:
            while node.op != "root":
                if node.op == "placeholder":
                    self._enter(node, pending)
                elif node.op == "output":
                    self._ask_for_sources(node)
                    given = self.program.outputs
                    outputs = [self.values[a] if isinstance(a, fx.Node) else a for a in given]
                elif self.stands_aside(node):
                    pass
                elif node.op == "get_attr":
                    if node not in self.rereadable:
                        self.values[node] = self.constant(node)
                else:
                    if node in stops:
                        with self._outside():
                            yield self.paused(node)
                    if self._ahead.pop(node, None) is None:
                        self._ask_for_sources(node)
                        self.values[node] = self.call(node)
                    self._follow(node)
                self.made(node)
                for done in last.get(node, ()):
                    self.free(done)
                node = node.next
        finally:
            for region in reversed(self._regions):
                region.__exit__(None, None, None)
            self._regions = []
        return outputs

    def _enter(self, node: fx.Node, pending: deque[Any]) -> None:
        """Have the value of an input, or of a tensor that is written to."""
        name = self.program.tensors.get(node)
        if name is None:
            self.values[node] = self.given(node, pending.popleft())
        elif node not in self.rereadable:
            self.values[node] = self.tensor(node, name)

    def _follow(self, node: fx.Node) -> None:
        """Note that a node has entered or left an autocast region."""
        if enters_autocast(node):
            self._regions.append(self.values[node])
        elif leaves_autocast(node):
            self._regions.remove(self.values[node.all_input_nodes[0]])

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Outside of all autocast regions for the time of the context; for good if given up."""
        regions, self._regions = self._regions, []
        self._paused_in = bool(regions)
        for region in reversed(regions):
            region.__exit__(None, None, None)
        yield
        for region in regions:
            region.__enter__()
        self._regions = regions
