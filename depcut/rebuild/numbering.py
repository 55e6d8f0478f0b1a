"""Lists of modules of which some are gone, under the dense model's numbers or numbered anew.

A smaller model is compared with the dense one by names. So as long as that lasts, layers that stay
keep the numbers that they had; a list of modules with gaps still counts and indexes its entries one
by one, as the list that its class builds does.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from depcut.plan.stacks import Stack
from depcut.support.torch_private import children_of

_GAPS = "_depcut_gaps"


def leave_out(model: nn.Module, stacks: Iterable[Stack]) -> None:
    """Take layers out of a model; those that stay keep their numbers.

    Args:
        model: The dense model's layers; it is changed.
        stacks: Which stay.
    """
    for stack in stacks:
        for holder in stack.holders:
            held = model.get_submodule(holder)
            children = children_of(held)
            for number in stack.gone:
                del children[str(number)]
            held.__class__ = _with_gaps(type(held))


def spread_out(model: nn.Module, stacks: Iterable[Stack]) -> None:
    """Give the layers of a smaller model the numbers that they have in the dense one.

    Args:
        model: What its class builds with fewer layers; it is changed.
        stacks: Which layers these are.
    """
    for stack in stacks:
        for holder in stack.holders:
            _number(model.get_submodule(holder), map(str, stack.kept))


def number_anew(model: nn.Module) -> None:
    """Number the layers of a model one by one, as its class does.

    Args:
        model: What `leave_out` changed, or any other, in which case nothing is done.
    """
    for held in _lists(model):
        held.__class__ = type(held).__bases__[0]
        children = children_of(held)
        layers = list(children.values())
        children.clear()
        children.update({str(i): layer for i, layer in enumerate(layers)})


@contextmanager
def numbered_anew(model: nn.Module) -> Iterator[None]:
    """A context in which the layers of a model are numbered as its class does.

    Args:
        model: What `leave_out` changed, or any other.
    """
    before = [(held, [*children_of(held)]) for held in _lists(model)]
    number_anew(model)
    try:
        yield
    finally:
        for held, names in before:
            _number(held, names)


def plain_kind(kind: type) -> type:
    """The class of a list of modules without what gaps need.

    Args:
        kind: Any class.
    """
    return kind.__bases__[0] if _GAPS in vars(kind) else kind


def _lists(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _GAPS in vars(type(module))]


def _number(held: nn.Module, names: Iterable[str]) -> None:
    children = children_of(held)
    layers = dict(zip(names, list(children.values()), strict=True))
    children.clear()
    children.update(layers)
    held.__class__ = _with_gaps(type(held))


def _with_gaps(kind: Any) -> Any:
    """A class of lists whose entries are counted, whatever their names are."""

    def entry(self: Any, index: Any) -> Any:
        if isinstance(index, slice):
            return kind.__getitem__(self, index)
        return list(children_of(self).values())[operator.index(index)]

    return type(kind.__name__, (kind,), {"__getitem__": entry, _GAPS: True})
