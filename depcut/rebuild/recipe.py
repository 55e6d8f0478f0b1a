"""How a model's class is built anew from a few numbers, as the model's library does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from depcut.plan.stacks import Path
from depcut.support.conventions import adapters

__all__ = ["NONE", "Cuts", "Number", "Path", "Recipe", "Values", "recipe_of"]

Number = int | float
Values = Mapping[Path, Number]
Cuts = Mapping[Path, tuple[int, ...]]  # entries that stay of a list, or of what a number counts
NONE: Cuts = {}


class Recipe(Protocol):
    """The numbers that a model's class is built from."""

    @property
    def fields(self) -> Mapping[Path, Number | None]:
        """Dense value of every number by its path; None: derived, yet it may be given."""
        ...

    @property
    def lists(self) -> Mapping[Path, tuple[Any, ...]]:
        """Entries of every list by its path."""
        ...

    def build(self, values: Values, cuts: Cuts = NONE) -> nn.Module:
        """The class with some numbers exchanged, as a fresh process builds it from a file.

        Args:
            values: New values by path.
            cuts: Entries that stay, in their order, by the path of a list or of a number of such
                entries, which becomes how many stay.

        Returns:
            A model whose large tensors are on the meta device, and whose buffers have values.

        Raises:
            Exception: Whatever the class or the library raises on such values.
        """
        ...


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe of a model, from the adapter of its library: its function `recipe(model)`.

    Args:
        model: Any model; it is only read.

    Returns:
        It; None where no library is known to build the model's class from numbers.
    """
    makers = (getattr(adapter, "recipe", None) for adapter in adapters(model))
    found = (make(model) for make in makers if make is not None)
    return next((recipe for recipe in found if recipe is not None), None)
