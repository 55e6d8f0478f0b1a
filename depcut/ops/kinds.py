"""Sets of operators that are alike in one respect; each family declares its own."""

from __future__ import annotations

from depcut.graph.operators import names_of


class Kind:
    """A set of operators, by the names that rules are registered with."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, *targets: str) -> None:
        """Declare operators to be of this kind."""
        self._names.update(targets)

    def __contains__(self, target: object) -> bool:
        return not self._names.isdisjoint(names_of(target))


NORMS = Kind()  # they divide by statistics of their input, and scale by a weight
PRODUCTS = Kind()  # of several tensors, linear in each of them
MATRIX_PRODUCTS = Kind()  # those that sum over a dimension which two activations may share
SOFTMAXES = Kind()
SCALINGS = Kind()  # of a tensor, element by element, by another one
