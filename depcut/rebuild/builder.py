"""Twins of a class at other numbers, each built once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import nn

from depcut.plan.stacks import Stack
from depcut.rebuild.numbering import spread_out
from depcut.rebuild.recipe import Number, Path, Recipe, Values
from depcut.rebuild.twin import Twin, alike, twin_of
from depcut.support.failures import reraise_fatal

_PROBES = (6, 10)  # values of a number that is derived where none is given
_LARGEST_FACTOR = 16  # an integer up to which may be a factor of a width, which need not be whole


class Builder:
    """Builds a class with other numbers, and remembers what came of it.

    Args:
        recipe: Of the model.

    Attributes:
        dense: The class as the dense model is.
        base: The dense numbers; those that are derived where none is given are among them.

    Raises:
        Exception: What the class or the library raises on the dense numbers.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._known: dict[tuple[Any, ...], Twin | None] = {}
        self.dense = twin_of(recipe.build({}))
        self.explicit: dict[Path, Number] = {}
        self.base: dict[Path, Number] = {}
        for path, value in recipe.fields.items():
            if value is not None:
                self.base[path] = self._factor(path, value)
            else:
                self.explicit |= self._given(path)
        self.base |= self.explicit

    def twin(self, values: Values, stacks: tuple[Stack, ...] = ()) -> Twin | None:
        """The class with other numbers; None where it cannot be built.

        Args:
            values: The numbers.
            stacks: Which layers stay; they have the names that they have in the dense model.
        """
        numbers = tuple(sorted(values.items(), key=lambda item: list(map(str, item[0]))))
        key = (numbers, stacks)
        if key not in self._known:
            try:
                built = twin_of(built_with(self.recipe, {**self.explicit, **values}, stacks))
            except Exception as error:  # noqa: BLE001  (a library's own checks of its numbers)
                reraise_fatal(error)
                built = None
            self._known[key] = built
        return self._known[key]

    def scaled(self, factors: Mapping[Path, Fraction]) -> dict[Path, Number] | None:
        """Some of the numbers, scaled; None where one would be no integer any more.

        Args:
            factors: What each is multiplied with.
        """
        out: dict[Path, Number] = {}
        for path, factor in factors.items():
            value = self.base[path]
            exact = Fraction(value) * factor
            if isinstance(value, int):
                if exact.denominator != 1 or exact < 1:
                    return None
                out[path] = int(exact)
            else:
                # Rounded up: a class takes the whole part of its product with a width.
                near = float(exact)
                out[path] = near if Fraction(near) >= exact else math.nextafter(near, math.inf)
        return out

    def _factor(self, path: Path, value: Number) -> Number:
        """A number as a float where it need not be whole: where the class takes one and a half."""
        if isinstance(value, int) and value <= _LARGEST_FACTOR:
            whole, more, half = (self.twin({path: n}) for n in (value, value + 1, value + 0.5))
            sizes = [t.shapes for t in (whole, more, half) if t is not None]
            if len(sizes) == 3 and sizes[2] not in sizes[:2]:
                return float(value)
        return value

    def _given(self, path: Path) -> dict[Path, Number]:
        """The value of a number that changes nothing where it is given; {} where none does."""
        for probe in _PROBES:
            built = self.twin({path: probe})
            if built is None or not alike(self.dense, built):
                continue
            values = {
                Fraction(was * probe, now)
                for name, old in self.dense.shapes.items()
                for was, now in zip(old, built.shapes[name], strict=False)
                if was != now and now
            }
            value = min(values, default=Fraction(1, 2))
            if value.denominator != 1:
                continue
            again = self.twin({path: int(value)})
            if again is not None and again.shapes == self.dense.shapes:
                return {path: int(value)}
        return {}


def built_with(recipe: Recipe, values: Values, stacks: tuple[Stack, ...] = ()) -> nn.Module:
    """The class with other numbers, its layers under the names that they have in the dense model.

    Args:
        recipe: Of the model.
        values: New values by path.
        stacks: Which layers stay.

    Raises:
        Exception: What the class or the library raises on such values.
    """
    built = recipe.build(values, {p: kept for stack in stacks for p, kept in stack.cuts.items()})
    spread_out(built, stacks)
    return built
