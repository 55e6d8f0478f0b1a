"""How a model's class is built anew from a few numbers, as the model's library does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

Path = tuple[str | int, ...]  # of a number in nested fields and lists
Number = int | float
Values = Mapping[Path, Number]


class Recipe(Protocol):
    """The numbers that a model's class is built from."""

    @property
    def fields(self) -> Mapping[Path, Number | None]:
        """Dense value of every number by its path; None: derived, yet it may be given."""
        ...

    def build(self, values: Values) -> nn.Module:
        """The class with some numbers exchanged, as a fresh process builds it from a file.

        Args:
            values: New values by path.

        Returns:
            A model whose large tensors are on the meta device, and whose buffers have values.

        Raises:
            Exception: Whatever the class or the library raises on such values.
        """
        ...


Maker = Callable[[nn.Module], Recipe | None]


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe of a model; None where its library is not known to build classes from numbers.

    Args:
        model: Any model; it is only read.
    """
    # Each library's conventions are loaded with the first model that can be of it.
    from depcut.libraries import transformers_config

    makers: tuple[Maker, ...] = (transformers_config.recipe,)
    return next((found for make in makers if (found := make(model)) is not None), None)
