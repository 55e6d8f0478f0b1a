"""The numbers of a graph at a third length, from those at two: most grow with it along a line.

Not all do (a window that is filled up, a cut that stops at a limit), so who asks compares what the
graph gives with what the model gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from depcut.capture.program import Program
from depcut.graph.resized import Resized


class _NoLineError(Exception):
    """Values are none of one line."""


def between(program: Program, second: Resized, share: Fraction) -> Resized | None:
    """The numbers where every size has gone a share of its way from the captured to a second one.

    Args:
        program: The captured model.
        second: Its numbers at the second sizes.
        share: 0 at the captured sizes, 1 at the second ones.

    Returns:
        None where something differs that is no whole number on a line.
    """
    arguments = {}
    try:
        for node, there in second.arguments.items():
            arguments[node] = _on_line((node.args, node.kwargs), there, share)
        sizes = {n: _on_line(program.sizes[n], s, share) for n, s in second.sizes.items()}
    except _NoLineError:
        return None
    for node, value in second.constants.items():
        name = program.tensors.get(node)
        held = getattr(program.graph, str(node.target)) if name is None else None
        here = program.constants[name] if name is not None else held
        if not isinstance(here, torch.Tensor) or not isinstance(value, torch.Tensor):
            return None
        if here.shape != value.shape or not torch.equal(here, value):
            return None
    return Resized(arguments, second.constants, sizes)


def _on_line(first: Any, second: Any, share: Fraction) -> Any:
    """Nested numbers at a share of the way between two of the same structure."""
    if type(first) is int and type(second) is int:
        value = first + (second - first) * share
        if value.denominator != 1:
            raise _NoLineError
        return int(value)
    if isinstance(first, slice) and isinstance(second, slice):
        ends = ((getattr(s, n) for n in ("start", "stop", "step")) for s in (first, second))
        return slice(*(_on_line(a, b, share) for a, b in zip(*ends, strict=True)))
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {name: _on_line(value, second[name], share) for name, value in first.items()}
    pair = isinstance(first, list | tuple) and isinstance(second, list | tuple)
    if pair and len(first) == len(second):
        items = [_on_line(a, b, share) for a, b in zip(first, second, strict=True)]
        return tuple(items) if isinstance(first, tuple) else items
    if first is not second and (isinstance(first, fx.Node) or first != second):
        raise _NoLineError
    return first


def share_of_way(first: Any, second: Any, third: Any) -> Fraction | None:
    """How far on the way from first to second sizes the third ones are.

    Args:
        first: Nested tuples of sizes.
        second: Alike.
        third: Alike.

    Returns:
        None where they are on no line.
    """
    shares = set()
    for a, b, c in zip(*map(_flat, (first, second, third)), strict=True):
        if a != b:
            shares.add(Fraction(c - a, b - a))
        elif a != c:
            return None
    return shares.pop() if len(shares) == 1 else None


def _flat(sizes: Any) -> list[int]:
    return [n for part in sizes if part is not None for n in part]
