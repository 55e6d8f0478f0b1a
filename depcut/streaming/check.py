"""A written checkpoint against the dense one, by value, operator by operator.

The dense graph runs with the removed units zeroed where they are read, the smaller class's own
graph runs on what was written. After each operator the results are compared, and the smaller run
goes on from the kept part of the dense one's, so that each segment is judged by itself. Weights are
read when an operator needs them and forgotten behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from depcut.capture.program import Program, where
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError
from depcut.graph.interpreter import Interpreter, Pausing
from depcut.graph.operators import is_aten
from depcut.plan.keep import Keep
from depcut.rebuild.same_graph import Pairs
from depcut.reference.run import Reference, ReferenceRun, cast, kept_part
from depcut.support.closeness import relative_error
from depcut.support.torch_private import pytree
from depcut.verify.exciting import table_rows
from depcut.verify.verify import TOLERANCE

PRECISION = torch.float32  # of both runs, whatever the weights are stored in

_META = torch.device("meta")


@dataclass(frozen=True)
class _Unread:
    """A tensor that is read when it is asked for."""

    read: Callable[[], Tensor]


class _Values(dict[fx.Node, Any]):
    """Values of nodes; tensors of a checkpoint are held for one operator."""

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[fx.Node, Tensor] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        value = super().__getitem__(node)
        if not isinstance(value, _Unread):
            return value
        if node not in self._read:
            self._read[node] = value.read()
        return self._read[node]

    def forget(self) -> None:
        """Let go of what was read."""
        self._read.clear()


def _here(arguments: Any) -> Any:
    """Arguments of a graph that was captured on the meta device, for the CPU."""
    meta, cpu = torch.device("meta"), torch.device("cpu")
    return pytree.tree_map(
        lambda a: cpu if a == meta and isinstance(a, torch.device) else a, arguments
    )


class _Dense(ReferenceRun):
    """The dense graph with zeros where removed units are read.

    Args:
        keep: What stays.
        model: The dense model, on the meta device.
        weights: Its tensors.
    """

    def __init__(self, keep: Keep, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        reference = Reference(keep, model)
        reference.held = weights  # type: ignore[assignment]  # read by name, as a dictionary is
        super().__init__(reference, PRECISION, {}, (), None)
        self.values: _Values = _Values()
        self.last: tuple[fx.Node, Any] | None = None

    def tensor(self, node: fx.Node, name: str) -> Any:
        """Read when it is needed."""
        return _Unread(lambda: ReferenceRun.tensor(self, node, name))

    def values_of(self, node: fx.Node, values: Any) -> Any:
        """On the CPU."""
        return _here(super().values_of(node, values))

    def made(self, node: fx.Node) -> None:
        """Show what was computed."""
        self.last = (node, self.values[node]) if node.op == "call_function" else None
        self.values.forget()


class _Smaller(Interpreter):
    """The smaller class's own graph, compared after each operator.

    Args:
        keep: What stays of the dense graph.
        program: The smaller class's graph.
        weights: What was written.
        dense: The run beside it, which is one operator ahead.
        pairs: The nodes by those of the dense graph.
    """

    def __init__(
        self,
        keep: Keep,
        program: Program,
        weights: Mapping[str, Tensor],
        dense: _Dense,
        pairs: Pairs,
    ) -> None:
        super().__init__(program)
        self.keep, self.weights, self.dense, self.pairs = keep, weights, dense, pairs
        self.values: _Values = _Values()
        self.worst = 0.0

    def tensor(self, _: fx.Node, name: str) -> Any:
        """Read when it is needed."""
        anonymous = name in self.program.anonymous
        held: Mapping[str, Tensor] = self.program.constants if anonymous else self.weights

        def read() -> Tensor:
            value: Tensor = cast(held[name].detach(), PRECISION)
            return value if name in self.program.parameters else value.clone()

        return _Unread(read)

    def values_of(self, node: fx.Node, values: Any) -> Any:
        """On the CPU."""
        return _here(super().values_of(node, values))

    def call(self, node: fx.Node) -> Any:
        """The value of an operator; those that check the captured precision stand aside."""
        return None if is_aten(node, "_assert_tensor_metadata") else super().call(node)

    def made(self, node: fx.Node) -> None:
        """Compare what was computed, and go on from the kept part of the dense result."""
        if self.dense.last is not None and node.op == "call_function":
            beside, wanted = self.dense.last
            assert self.pairs[beside] is node
            terms = self.keep.coupling.env.get(beside)
            if isinstance(wanted, Tensor):
                self._compare(node, beside, kept_part(wanted, self.keep, terms))
        self.values.forget()

    def _compare(self, node: fx.Node, beside: fx.Node, wanted: Tensor) -> None:
        got = self.values[node]
        size, message = relative_error([wanted], [got])
        if not message and not wanted.is_floating_point() and not torch.equal(wanted, got):
            message = "other whole numbers"
        self.worst = max(self.worst, size)
        if message or not size <= TOLERANCE[PRECISION]:
            raise VerificationError(
                message or f"the smaller model differs by {size:.3g} of the scale",
                where=where(beside),
                remedy="keep the layers concerned with ignore=; please report the model",
            )
        if not self._is_view(node, got):
            self.values[node] = wanted.clone()

    def _is_view(self, node: fx.Node, got: Tensor) -> bool:
        """Whether a value shares the memory of an argument: changes of either are of both."""
        mine = got.untyped_storage().data_ptr()
        values = (dict.get(self.values, other) for other in node.all_input_nodes)
        tensors = (v for v in values if isinstance(v, Tensor))
        return any(v.untyped_storage().data_ptr() == mine for v in tensors)


def drawn_inputs(program: Program) -> list[Any]:
    """Flat inputs of the captured shapes on the CPU: numbers of tables, ones, or noise.

    Args:
        program: The captured graph.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = pytree.tree_leaves((program.args, program.kwargs))
    drawn: list[Any] = []
    for node, leaf in zip(program.inputs, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            drawn.append(leaf)
        elif leaf.is_floating_point():
            drawn.append(torch.randn(leaf.shape, generator=generator))
        elif leaf.dtype in (torch.int32, torch.int64) and (rows := table_rows(node)):
            numbers = torch.randint(0, rows, leaf.shape, generator=generator)
            drawn.append(numbers.to(leaf.dtype))
        else:
            drawn.append(torch.ones(leaf.shape, dtype=leaf.dtype))
    return drawn


def check_written(
    keep: Keep,
    model: nn.Module,
    built: tuple[Program, Pairs],
    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    tick: Callable[[int, int], None],
) -> float:
    """Compare a written checkpoint with the dense one by value, operator by operator.

    Args:
        keep: What stays.
        model: The dense model, on the meta device.
        built: The smaller class's own graph, and its nodes by those of the dense graph.
        weights: The tensors of the dense model and of the smaller one.
        tick: Is told how many operators have run, and of how many.

    Returns:
        The largest difference, relative to the scale.

    Raises:
        VerificationError: They differ.
    """
    (program, pairs), (before, after) = built, weights
    dense = _Dense(keep, model, before)
    small = _Smaller(keep, program, after, dense, pairs)
    inputs = drawn_inputs(keep.coupling.program)
    stops = [node for node in pairs if node.op == "call_function"]
    with torch.no_grad(), preserved():
        ahead = dense.steps(inputs, stops)
        behind = small.steps(list(inputs), [pairs[node] for node in stops])
        for done, _ in enumerate(_in_step(ahead, behind, len(stops))):
            tick(done, len(stops))
    return small.worst


def _in_step(ahead: Pausing, behind: Pausing, stops: int) -> Iterator[None]:
    """Both runs, one operator at a time, the first one ahead."""
    for _ in range(stops + 1):
        for run in (ahead, behind):
            next(run, None)
        yield
