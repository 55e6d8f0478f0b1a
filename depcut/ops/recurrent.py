"""LSTM, GRU and plain recurrent layers: weights are gates x hidden, directions are concatenated."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from depcut import axes
from depcut.axes import Dims, Term
from depcut.graph.arguments import Call
from depcut.graph.operators import is_aten
from depcut.ops.registry import Op, Output, rule
from depcut.ops.site import ContractionOp, Site, site

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_KINDS = tuple(f"aten.{name}.input" for name in _GATES)
_CONSTANTS = ("zeros", "new_zeros", "zeros_like", "ones", "ones_like", "full", "full_like")
_WITH_BIASES = 4  # parameters of a cell


@rule(*_KINDS)
def recurrent(op: Op) -> Output:
    """All layers and directions of one recurrent module.

    The fused operator takes one hidden size, so all layers keep equally many units. They keep the
    same ones where the final states are used (or initial ones given), since these stack the layers.
    """
    x = op.dims("input")
    states = op.arg("hx")
    states = list(states) if isinstance(states, list | tuple) else [states]
    params = list(op.arg("params"))
    directions = 2 if op.arg("bidirectional") else 1
    per_cell = len(params) // (op.arg("num_layers") * directions)
    gates = _GATES[op.name]
    if per_cell not in (2, _WITH_BIASES):
        return _projected(op, params, [*states, op.arg("input")])
    if len(x) == 3:
        batch, time = (0, 1) if op.arg("batch_first") else (1, 0)
        for state in states:
            op.broadcast((x[batch],), op.dims(state)[1:2])
    else:
        time = 0
    op.freeze(x[time], "time: the recurrence runs over it")
    hidden: list[Term] = []
    feature: Term = x[-1]
    for layer in range(op.arg("num_layers")):
        cells = []
        for direction in range(directions):
            at = (layer * directions + direction) * per_cell
            cells.append(_cell(op, params[at : at + per_cell], gates, feature, x[:-1]))
        hidden += cells
        feature = axes.concat(*map(axes.resolve, cells))
    state_dims = [op.dims(s) for s in states]
    for s, node in zip(state_dims, states, strict=True):
        op.freeze(s[0], "layers of a recurrent module")
        if not _is_constant(node):
            for h in hidden:
                op.unify(s[-1], h)
        op.unify(s[-1], hidden[0])
    op.tie(hidden)
    out: list[Dims | None] = [(*x[:-1], axes.resolve(feature))]
    if len(hidden) > 1 and not any(user.args[1] != 0 and user.users for user in op.node.users):
        # Rows of the final states keep different units: no term says that, and nobody reads them.
        return [*out, *([None] * len(states))]
    for h in hidden[1:]:
        op.unify(hidden[0], h)
    return [*out, *(tuple(map(axes.resolve, (*s[:-1], hidden[0]))) for s in state_dims)]


def _cell(
    op: Op, params: list[fx.Node], gates: int, feature: Term, steps: tuple[Term, ...]
) -> Term:
    """One layer in one direction: w_ih (gates H, in), w_hh (gates H, H), two biases."""
    w_ih, w_hh = (op.dims(p) for p in params[:2])
    hidden = w_hh[1]
    rows = axes.product(op.frozen(gates, "gates of a recurrent cell"), hidden)
    op.unify(w_ih[1], feature)
    for param in params:
        op.unify(op.dims(param)[0], rows)
    for param in params[:2]:
        op.contract(param, 1)
    op.macs(*steps, axes.resolve(w_ih[0]), w_ih[1])
    op.macs(*steps, axes.resolve(w_hh[0]), hidden)
    return axes.resolve(hidden)


def _is_constant(node: fx.Node) -> bool:
    """Whether a state holds one value everywhere, so that any of its units may go."""
    return is_aten(node, *_CONSTANTS)


def _projected(op: Op, params: list[fx.Node], others: list[fx.Node]) -> Output:
    why = "a recurrent layer with proj_size"
    for node in [*params, *others]:
        for term in op.dims(node):
            op.freeze(term, why)
    return [tuple(op.frozen(n, why) for n in s) for s in op.sizes[op.node]]


@dataclass(frozen=True)
class Cell:
    """One layer in one direction of an LSTM, GRU or plain recurrent operator.

    Attributes:
        kind: Name of the operator.
        layer: Number of the layer.
        direction: 0 forwards, 1 backwards.
        parts: Positions of its weights among the cell's: 0 what is below, 1 the last step.
    """

    kind: str
    layer: int
    direction: int
    parts: tuple[int, ...]

    @property
    def result(self) -> None:
        """None: the operator does not return the gates that W produces."""

    def _layout(self, call: Call) -> tuple[int, int]:
        """(directions, parameters of one cell)."""
        directions = 2 if call["bidirectional"] else 1
        return directions, len(call["params"]) // (directions * call["num_layers"])

    def _weights(self, call: Call) -> list[torch.Tensor]:
        directions, per_cell = self._layout(call)
        at = (self.layer * directions + self.direction) * per_cell
        return [call["params"][at + part] for part in self.parts]

    def inputs(self, call: Call) -> torch.Tensor:
        """(1, batch * time, features below and hidden units of the step before)."""
        directions, per_cell = self._layout(call)
        params = call["params"]
        x = call["input"].to(params[0].dtype)  # an autocast region casts both
        states = call["hx"] if isinstance(call["hx"], list | tuple) else [call["hx"]]
        below = x
        for layer in range(self.layer + 1):
            below = x
            rows = slice(layer * directions, (layer + 1) * directions)
            part = params[rows.start * per_cell : rows.stop * per_cell]
            x = self._run(call, x, [s[rows] for s in states], part)
        chunk = x.chunk(directions, -1)[self.direction]
        start = states[0][self.layer * directions + self.direction]
        time = -2 if call.get("batch_first", False) or x.ndim == 2 else 0
        first = start.unsqueeze(time) if start.ndim < x.ndim else start
        steps = chunk.shape[time]
        before = (
            torch.cat([chunk.narrow(time, 1, steps - 1), first], time)
            if self.direction
            else torch.cat([first, chunk.narrow(time, 0, steps - 1)], time)
        )
        read = [(below, before)[part] for part in self.parts]
        return torch.cat([r.flatten(0, -2) for r in read], -1)[None]

    def reads(self, nodes: Call, call: Call) -> tuple[Hashable, ...] | None:  # noqa: ARG002  (of a family)
        """Not known: what a cell reads is its own state, too."""
        return None

    def _run(self, call: Call, x: torch.Tensor, states: Any, params: Any) -> torch.Tensor:
        """Outputs of one layer, without dropout."""
        operator = getattr(torch.ops.aten, self.kind).input
        hx = states if self.kind == "lstm" else states[0]
        options = [call["has_biases"], 1, 0.0, False, call["bidirectional"], call["batch_first"]]
        out: torch.Tensor = operator(x, hx, list(params), *options)[0]
        return out

    def matrix(self, call: Call) -> torch.Tensor:
        """(1, gates * hidden, columns of all parts)."""
        return torch.cat(self._weights(call), 1)[None]

    def write(self, call: Call, matrix: torch.Tensor) -> None:
        """Write W of shape (1, gates * hidden, columns of all parts) into the weights."""
        weights = self._weights(call)
        for weight, part in zip(
            weights, matrix[0].split([w.shape[1] for w in weights], 1), strict=True
        ):
            weight.copy_(part)


@site(*_KINDS)
def cells(op: ContractionOp) -> list[Site]:
    """One site a cell; two for a GRU, whose reset gate acts between its two products."""
    kind = op.name
    directions = 2 if op.arg("bidirectional") else 1
    layers = op.arg("num_layers")
    names = [op.parameter(p) for p in op.arg("params")]
    per_cell = len(names) // (layers * directions)
    if None in names or per_cell not in (2, _WITH_BIASES):
        return []
    sites = []
    for number in range(layers * directions):
        cell = [n for n in names[number * per_cell : (number + 1) * per_cell] if n is not None]
        for parts in ((0,), (1,)) if kind == "gru" else ((0, 1),):
            weights = tuple(cell[part] for part in parts)
            columns = tuple((op.stored[w][1],) for w in weights)
            biases = tuple(cell[2 + part] for part in parts) if per_cell == _WITH_BIASES else ()
            rows = op.stored[weights[0]][0]
            family = Cell(kind, number // directions, number % directions, parts)
            own = int(1 in parts)
            sites.append(Site(op.node, weights, biases, columns, rows, family, own))
    return sites
