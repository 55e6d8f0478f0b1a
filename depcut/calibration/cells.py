"""Sites of recurrent layers: what each cell reads from below, and from its own last step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from depcut.calibration.site import Call, Place, Site

_GATED = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_WITH_BIASES = 4


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
        """The gates are not the result."""

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
        """Cut again."""
        weights = self._weights(call)
        for weight, part in zip(
            weights, matrix[0].split([w.shape[1] for w in weights], 1), strict=True
        ):
            weight.copy_(part)


def recurrent(place: Place) -> list[Site]:
    """One site a cell; two for a GRU, whose reset gate acts between its two products."""
    kind = str(place.node.target).split(".")[1]
    directions = 2 if place.arg("bidirectional") else 1
    layers = place.arg("num_layers")
    names = [place.parameter(p) for p in place.arg("params")]
    per_cell = len(names) // (layers * directions)
    if None in names or per_cell not in (2, _WITH_BIASES) or kind not in _GATED:
        return []
    sites = []
    for number in range(layers * directions):
        cell = [n for n in names[number * per_cell : (number + 1) * per_cell] if n is not None]
        for parts in ((0,), (1,)) if kind == "gru" else ((0, 1),):
            weights = tuple(cell[part] for part in parts)
            columns = tuple((place.coupling.dims[w][1],) for w in weights)
            biases = tuple(cell[2 + part] for part in parts) if per_cell == _WITH_BIASES else ()
            rows = place.coupling.dims[weights[0]][0]
            family = Cell(kind, number // directions, number % directions, parts)
            own = int(1 in parts)
            sites.append(Site(place.node, weights, biases, columns, rows, family, own))
    return sites
