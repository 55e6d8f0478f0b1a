"""A written checkpoint against the dense one, by value, operator by operator.

The dense graph runs with the removed units zeroed where they are read, the smaller class's own
graph runs on what was written. After each operator the results are compared, and the smaller run
goes on from the kept part of the dense one's, so that each segment is judged by itself. Weights are
read when an operator needs them and forgotten behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from depcut.capture.program import Program, where
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError
from depcut.graph.interpreter import Interpreter, Pausing
from depcut.graph.operators import is_aten
from depcut.plan.keep import Keep
from depcut.rebuild.same_graph import Pairs
from depcut.reference.run import Reference, ReferenceRun, Spared, cast, kept_part
from depcut.streaming.weights import PRECISION
from depcut.support.closeness import relative_error
from depcut.support.torch_private import pytree
from depcut.verify.exciting import table_rows
from depcut.verify.verify import TOLERANCE


class Constants(Protocol):
    """Constants of removed units that biases and running means took over."""

    @property
    def spared(self) -> Spared:
        """Where these units go on to contribute, see `depcut.reference.run.Reference`."""

    @property
    def shifts(self) -> Mapping[fx.Node, Tensor]:
        """What the result of a node lacks, which the batch norm behind it makes up for."""

    @property
    def rounded(self) -> Mapping[fx.Node, torch.dtype]:
        """Nodes that read a tensor that took one over, with the precision that it has."""


class _Dense(ReferenceRun):
    """The dense graph with zeros where removed units are read; sliced, where data changed weights.

    Args:
        keep: What stays.
        weights: The dense tensors.
        changed: Narrowed tensors that data changed, and all others, if it changed any.
        pairs: Nodes of the smaller class's graph by those of this one.
        spared: Where removed units go on to contribute, see `Reference`.
    """

    def __init__(
        self,
        keep: Keep,
        weights: Mapping[str, Tensor],
        changed: Mapping[str, Tensor] | None,
        pairs: Pairs,
        spared: Spared | None,
    ) -> None:
        reference = Reference(keep, weights, changed is not None, spared)
        super().__init__(reference, PRECISION, changed)
        self.pairs = pairs
        self.last: tuple[fx.Node, fx.Node, Any] | None = None

    def made(self, node: fx.Node) -> None:
        """Show what was computed."""
        if node.op == "call_function" and node in self.pairs:
            self.last = (self.pairs[node], node, self.values[node])
        self.let_go()


class _Smaller(Interpreter):
    """The smaller class's own graph, compared after each operator.

    Args:
        keep: What stays of the dense graph.
        program: The smaller class's graph.
        weights: What was written.
        dense: The run beside it, which is one operator ahead.
        constants: Of removed units, if they were folded.
    """

    def __init__(
        self,
        keep: Keep,
        program: Program,
        weights: Mapping[str, Tensor],
        dense: _Dense,
        constants: Constants | None,
    ) -> None:
        super().__init__(program)
        self.keep, self.weights, self.dense = keep, weights, dense
        self.shifts = constants.shifts if constants is not None else {}
        self.rounded = constants.rounded if constants is not None else {}
        self.worst, self.compared = 0.0, 0

    def tensor(self, _: fx.Node, name: str) -> Any:
        """A constant, or what was written."""
        anonymous = name in self.program.anonymous
        held: Mapping[str, Tensor] = self.program.constants if anonymous else self.weights
        value: Tensor = cast(held[name].detach(), PRECISION)
        return value if name in self.program.parameters else value.clone()

    def call(self, node: fx.Node) -> Any:
        """The value of an operator; those that check the captured precision stand aside."""
        return None if is_aten(node, "_assert_tensor_metadata") else super().call(node)

    def made(self, node: fx.Node) -> None:
        """Compare what was computed, and go on from the kept part of the dense result."""
        if self.dense.last is not None and node is self.dense.last[0]:
            _, beside, wanted = self.dense.last
            self.compared += 1
            terms = self.keep.coupling.env.get(beside)
            if isinstance(wanted, Tensor):
                sliced = self.dense.sliced
                kept = wanted if sliced else kept_part(wanted, self.keep, terms)
                if beside in self.shifts:
                    shift = self.shifts[beside].to(kept.dtype)
                    kept = kept - shift.reshape(-1, *[1] * (kept.ndim - 2))
                self._compare(node, beside, kept)
        self.let_go()

    def _compare(self, node: fx.Node, beside: fx.Node, wanted: Tensor) -> None:
        got = self.values[node]
        size, message = relative_error([wanted], [got])
        if not message and not wanted.is_floating_point() and not torch.equal(wanted, got):
            message = "other whole numbers"
        self.worst = max(self.worst, size)
        if message or not size <= TOLERANCE[self.rounded.get(beside, PRECISION)]:
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
        values = map(self.values.get, node.all_input_nodes)
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
    built: tuple[Program, Pairs],
    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    tick: Callable[[int, int], None],
    changed: Mapping[str, Tensor] | None = None,
    constants: Constants | None = None,
) -> float:
    """Compare a written checkpoint with the dense one by value, operator by operator.

    Args:
        keep: What stays.
        built: The smaller class's own graph, and its nodes by those of the dense graph.
        weights: The tensors of the dense model and of the smaller one.
        tick: Is told how many operators have run, and of how many.
        changed: Narrowed tensors of which data changed some, if there is data: the dense graph
            runs on these then.
        constants: Of removed units, if they were folded.

    Returns:
        The largest difference, relative to the scale.

    Raises:
        VerificationError: They differ.
    """
    (program, pairs), (before, after) = built, weights
    spared = constants.spared if constants is not None else None
    dense = _Dense(keep, before, changed, pairs, spared)
    small = _Smaller(keep, program, after, dense, constants)
    inputs = drawn_inputs(keep.coupling.program)
    stops = [node for node in pairs if node.op == "call_function"]
    with torch.no_grad(), preserved():
        ahead = dense.steps(inputs, stops)
        behind = small.steps(list(inputs), [pairs[node] for node in stops])
        for done, _ in enumerate(_in_step(ahead, behind, len(stops))):
            tick(done, len(stops))
    if small.compared != len(stops):
        raise VerificationError(
            f"{small.compared} of {len(stops)} operators could be compared",
            where="the whole model",
            remedy="use depcut.shrink of the loaded model; please report it",
        )
    return small.worst


def _in_step(ahead: Pausing, behind: Pausing, stops: int) -> Iterator[None]:
    """Both runs, one operator at a time, the first one ahead."""
    for _ in range(stops + 1):
        for run in (ahead, behind):
            next(run, None)
        yield
