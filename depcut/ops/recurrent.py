"""LSTM, GRU and plain recurrent layers: weights are gates x hidden, directions are concatenated."""

from __future__ import annotations

from torch import fx

from depcut import axes
from depcut.axes import Dims, Term
from depcut.ops.registry import Op, Output, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_CONSTANT = ("aten.zeros", "aten.new_zeros", "aten.zeros_like", "aten.ones", "aten.full")


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(op: Op) -> Output:
    """All layers and directions of one recurrent module.

    The fused operator takes one hidden size, so all layers keep equally many units. They keep the
    same ones where the final states are used (or initial ones given), since these stack the layers.
    """
    kind = str(op.node.target).split(".")[1]
    x = op.dims("input")
    states = op.arg("hx")
    states = list(states) if isinstance(states, list | tuple) else [states]
    params = list(op.arg("params"))
    directions = 2 if op.arg("bidirectional") else 1
    per_cell = len(params) // (op.arg("num_layers") * directions)
    gates = _GATES[kind]
    if per_cell not in (2, 4):
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
    return str(node.target).startswith(_CONSTANT)


def _projected(op: Op, params: list[fx.Node], others: list[fx.Node]) -> Output:
    why = "a recurrent layer with proj_size"
    for node in [*params, *others]:
        for term in op.dims(node):
            op.freeze(term, why)
    return [tuple(op.frozen(n, why) for n in s) for s in op.sizes[op.node]]
