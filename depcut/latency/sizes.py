"""Sizes in a runtime's profile, recognised as counts of the model's own terms.

A profile holds shapes as numbers. Over samples in which all widths vary independently, a dimension
that always is c times the count of a term (or that count in whole blocks) is taken for that term.
A dimension that no term explains is unknown: no feature of a kernel's time is built from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depcut.axes import Axis, Concat, Product, Term
from depcut.coupling.groups import Coupling
from depcut.plan.cost import Polynomial, polynomial

_BLOCKS = (1, 8, 16, 32)
_MOST = 0.7  # of the samples must agree with a term

Series = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """One dimension of one kernel as a function of the kept counts.

    Attributes:
        count: The count as a polynomial in the kept counts; a constant has the monomial () only.
        block: What it is rounded up to a multiple of.
    """

    count: Polynomial
    block: int = 1


def constant(value: float) -> Size:
    """A dimension that does not depend on the widths.

    Args:
        value: Its size.
    """
    return Size({(): float(value)})


class Recogniser:
    """Finds the term behind a series of sizes.

    Args:
        coupling: Whose terms are candidates.
        counts: Kept counts of the samples, [samples, groups].
    """

    def __init__(self, coupling: Coupling, counts: NDArray[np.int64]) -> None:
        distinct: dict[tuple[Any, ...], Polynomial] = {}
        for term in _terms(coupling):
            count = polynomial(coupling, term)
            distinct.setdefault(tuple(sorted(count.items())), count)
        # the simplest term wins where several have the same counts in every sample
        ordered = sorted(distinct.values(), key=lambda p: (len(p), max(map(len, p))))
        self._terms = [
            (count, _evaluated(count, counts)) for count in ordered if set(count) != {()}
        ]
        self._tables: dict[tuple[int, ...], _Table] = {}

    def size(self, series: Series, places: tuple[int, ...]) -> Size | None:
        """The dimension whose sizes in the samples are these; None if no term explains them.

        Args:
            series: Its size in some of the samples.
            places: Numbers of these samples.
        """
        if not np.ptp(series):
            return constant(float(series[0]))
        if places not in self._tables:
            self._tables[places] = _Table(self._terms, np.array(places))
        return self._tables[places].size(series)


class _Table:
    """Counts of all terms in some of the samples, to look a series of sizes up in.

    Args:
        terms: Polynomials with their counts in all samples.
        places: Numbers of the samples that are looked at.
    """

    def __init__(self, terms: list[tuple[Polynomial, Series]], places: Series) -> None:
        self._known: dict[tuple[int, ...], tuple[Polynomial, int, int]] = {}
        self._all: list[tuple[Polynomial, int, Series]] = []
        for block, (count, counts) in itertools.product(_BLOCKS, terms):
            exact = counts[places]
            rounded = -(-exact // block) * block
            if not np.ptp(exact):
                continue
            self._all.append((count, block, rounded))
            # runtimes have a path of its own for less than a block, which rounds nothing
            for series in (rounded, np.where(exact < block, exact, rounded)):
                divisor = int(np.gcd.reduce(series))
                key = tuple((series // divisor).tolist())
                self._known.setdefault(key, (count, block, divisor))

    def size(self, series: Series) -> Size | None:
        """The term whose counts are proportional to the sizes, else the one that explains most."""
        divisor = int(np.gcd.reduce(series))
        known = self._known.get(tuple((series // divisor).tolist()))
        if known is None:
            return self._nearest(series)
        count, block, own = known
        return _scaled(count, block, divisor / own)

    def _nearest(self, series: Series) -> Size | None:
        """The term that explains most samples, for what a runtime does at some widths only."""
        if not self._all:
            return None
        table = np.stack([candidate for _, _, candidate in self._all]).astype(np.float64)
        scales = series[0] / table[:, 0]
        agreement = np.isclose(table * scales[:, None], series).mean(axis=1)
        best = int(agreement.argmax())
        if agreement[best] < _MOST:
            return None
        count, block, _ = self._all[best]
        return _scaled(count, block, float(scales[best]))


def _scaled(count: Polynomial, block: int, scale: float) -> Size | None:
    """A multiple of a count; of a rounded one, only whole multiples can be written."""
    if block > 1 and scale != int(scale):
        return None
    scaled = {monomial: factor * scale for monomial, factor in count.items()}
    return Size(scaled, int(block * scale) if block > 1 else 1)


def _evaluated(count: Polynomial, counts: NDArray[np.int64]) -> Series:
    total = np.zeros(len(counts))
    for groups, factor in count.items():
        total += factor * counts[:, list(groups)].prod(axis=1)
    return np.rint(total).astype(np.int64)


def _terms(coupling: Coupling) -> Iterator[Term]:
    """Every dimension of every tensor of the model."""
    for values in (coupling.dims.values(), coupling.env.values()):
        for value in values:
            yield from _flat(value)


def _flat(value: Any) -> Iterator[Term]:
    if isinstance(value, (Axis, Product, Concat)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
