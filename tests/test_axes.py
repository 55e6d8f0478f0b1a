"""The algebra of dimensions, judged by index vectors that go through the same numpy operations."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from depcut import axes
from depcut.axes import UNIT, Axis, Concat, Indices, Product, Reason, Term

Array = NDArray[np.int64]
Kept = dict[Axis, Indices]

WHY = Reason("because", "node")
THOROUGH = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


# Making terms and kept sets -----------------------------------------------------------------------


def free_axes(*terms: Term) -> list[Axis]:
    leaves = [leaf for term in terms for leaf in axes.leaves(axes.resolve(term))]
    return [leaf for leaf in dict.fromkeys(leaves) if leaf.reason is None]


def frozen_axes(*terms: Term) -> list[Axis]:
    leaves = [leaf for term in terms for leaf in axes.leaves(axes.resolve(term))]
    return [leaf for leaf in dict.fromkeys(leaves) if leaf.reason is not None]


def sizes(*terms: Term) -> list[int]:
    return [leaf.size for leaf in free_axes(*terms)]


def some_kept(rng: np.random.Generator, *terms: Term) -> Kept:
    """A random non-empty set of kept indices for every free axis."""
    kept: Kept = {}
    for leaf in free_axes(*terms):
        count = int(rng.integers(1, leaf.size + 1))
        kept[leaf] = np.sort(rng.choice(leaf.size, count, replace=False)).astype(np.int64)
    return kept


def evaluated(term: Term, kept: Kept) -> Indices:
    """The kept indices, after checking that counting agrees with listing."""
    term = axes.resolve(term)
    found = axes.indices(term, kept)
    assert axes.count(term, lambda leaf: len(kept.get(leaf, range(leaf.size)))) == len(found)
    assert np.all(np.diff(found) > 0)
    assert not len(found) or 0 <= found[0] <= found[-1] < term.size
    return found


def factorizations(n: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write n as a product of factors of two or more."""
    if n == 1:
        yield ()
    for first in range(2, n + 1):
        if n % first == 0:
            for rest in factorizations(n // first):
                yield (first, *rest)


def compositions(n: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write n as a sum of positive parts."""
    if n == 0:
        yield ()
    for first in range(1, n + 1):
        for rest in compositions(n - first):
            yield (first, *rest)


@st.composite
def terms(draw: st.DrawFn, size: int, depth: int = 3) -> Term:
    """A term of the given size over fresh axes, some of them frozen."""
    kind = draw(st.sampled_from(["axis", "product", "concat"])) if depth else "axis"
    if kind == "product":
        factors = draw(st.sampled_from(list(factorizations(size))))
        return axes.product(*(draw(terms(n, depth - 1)) for n in factors))
    if kind == "concat":
        at = draw(st.integers(0, size))
        return axes.concat(*(draw(terms(n, depth - 1)) for n in (at, size - at) if n))
    return axes.axis(size, WHY if draw(st.integers(0, 9)) == 0 else None)


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 18, 24, 30])
SEEDS = st.integers(0, 2**16)


@st.composite
def term_pairs(draw: st.DrawFn) -> tuple[Term, Term]:
    size = draw(SIZES)
    return draw(terms(size)), draw(terms(size))


# Arrays whose dimensions are terms ----------------------------------------------------------------


@dataclass
class Labelled:
    """An array of distinct labels, the terms of its dimensions, and how it came about.

    `replay` does the same operations again on sliced sources, at the sizes that `count` gives.
    """

    terms: list[Term]
    labels: Array
    replay: Callable[[Kept], Array]

    def kept_part(self, kept: Kept) -> Array:
        return self.labels[np.ix_(*(evaluated(t, kept) for t in self.terms))]


def width(term: Term, kept: Kept) -> int:
    return len(evaluated(term, kept))


def source(shape: tuple[int, ...], first: int, frozen: int = -1) -> Labelled:
    dims = [axes.axis(n, WHY if i == frozen else None) for i, n in enumerate(shape)]
    labels = first + np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    out = Labelled(dims, labels, lambda kept: labels)
    out.replay = out.kept_part
    return out


def reshaped(x: Labelled, shape: tuple[int, ...]) -> Labelled:
    out = axes.regroup(x.terms, list(shape))

    def replay(kept: Kept) -> Array:
        return x.replay(kept).reshape([width(t, kept) for t in out])

    return Labelled(out, x.labels.reshape(shape), replay)


def permuted(x: Labelled, order: tuple[int, ...]) -> Labelled:
    return Labelled(
        [x.terms[i] for i in order],
        x.labels.transpose(order),
        lambda kept: x.replay(kept).transpose(order),
    )


def part(x: Labelled, dim: int, at: int, tail: bool) -> Labelled:
    head, rest = axes.pieces(x.terms[dim], [at, x.terms[dim].size - at])

    def side(array: Array, at: int) -> Array:
        return np.split(array, [at], axis=dim)[int(tail)]

    return Labelled(
        [rest if tail and i == dim else head if i == dim else t for i, t in enumerate(x.terms)],
        side(x.labels, at),
        lambda kept: side(x.replay(kept), width(head, kept)),
    )


def rolled(x: Labelled, dim: int, at: int) -> Labelled:
    head, rest = axes.pieces(x.terms[dim], [at, x.terms[dim].size - at])
    turned = [axes.concat(rest, head) if i == dim else t for i, t in enumerate(x.terms)]
    return Labelled(
        turned,
        np.roll(x.labels, -at, dim),
        lambda kept: np.roll(x.replay(kept), -width(head, kept), dim),
    )


def joined(x: Labelled, y: Labelled, dim: int) -> Labelled:
    """Concatenation; the other dimensions unify."""
    for i, (a, b) in enumerate(zip(x.terms, y.terms, strict=True)):
        if i != dim:
            axes.unify(a, b)
    both = axes.concat(axes.resolve(x.terms[dim]), axes.resolve(y.terms[dim]))
    return Labelled(
        [both if i == dim else t for i, t in enumerate(x.terms)],
        np.concatenate([x.labels, y.labels], dim),
        lambda kept: np.concatenate([x.replay(kept), y.replay(kept)], dim),
    )


@dataclass
class Chain:
    """A random chain of operations, with everything made on the way."""

    made: list[Labelled]
    unified: list[tuple[Term, Term]] = field(default_factory=list)


def next_step(draw: st.DrawFn, chain: Chain) -> None:
    x = chain.made[-1]
    kind = draw(st.sampled_from(["reshape", "permute", "part", "roll", "join", "meet", "meet"]))
    dim = draw(st.integers(0, x.labels.ndim - 1))
    size = x.labels.shape[dim]
    if kind == "reshape":
        chain.made.append(reshaped(x, draw(st.sampled_from(list(factorizations(x.labels.size))))))
    elif kind == "permute":
        order = tuple(draw(st.permutations(range(x.labels.ndim))))
        chain.made.append(permuted(x, order))
    elif kind == "part" and x.labels.size > size > 1:
        at = draw(st.integers(1, size - 1))
        chain.made.append(part(x, dim, at, draw(st.booleans())))
    elif kind == "roll" and size > 1:
        chain.made.append(rolled(x, dim, draw(st.integers(1, size - 1))))
    elif kind == "join" and x.labels.size <= 100:
        other = draw(st.integers(1, 3))
        shape = tuple(other if i == dim else n for i, n in enumerate(x.labels.shape))
        y = x if draw(st.booleans()) else source(shape, 1000 * len(chain.made))
        chain.made.append(joined(x, y, dim))
    elif kind == "meet":
        alike = [t for y in chain.made for t in y.terms if t.size == size and size > 1]
        if alike:
            other_term = draw(st.sampled_from(alike))
            chain.unified.append((x.terms[dim], other_term))
            axes.unify(x.terms[dim], other_term, "meet")


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=3)))
    chain = Chain([source(shape, 0, draw(st.integers(-6, len(shape) - 1)))])
    for _ in range(draw(st.integers(1, 6))):
        next_step(draw, chain)
    return chain


@settings(THOROUGH, max_examples=400)
@given(chains(), SEEDS)
def test_slicing_commutes_with_any_chain_of_views_cuts_and_joins(chain: Chain, seed: int) -> None:
    rng = np.random.default_rng(seed)
    everything = [t for x in chain.made for t in x.terms]
    assert all(len([*axes.leaves(axes.resolve(t))]) <= t.size for t in everything)
    for _ in range(3):
        kept = some_kept(rng, *everything)
        for x in chain.made:
            np.testing.assert_array_equal(x.replay(kept), x.kept_part(kept))
        for a, b in chain.unified:
            np.testing.assert_array_equal(evaluated(a, kept), evaluated(b, kept))


# Unification --------------------------------------------------------------------------------------


@THOROUGH
@given(term_pairs(), SEEDS)
def test_unified_terms_denote_the_same_indices(pair: tuple[Term, Term], seed: int) -> None:
    a, b = pair
    axes.unify(a, b, "node")
    rng = np.random.default_rng(seed)
    for _ in range(3):
        kept = some_kept(rng, a, b)
        np.testing.assert_array_equal(evaluated(a, kept), evaluated(b, kept))
    for leaf in frozen_axes(a, b):
        assert leaf.reason is not None
        assert leaf.reason.why


@THOROUGH
@given(term_pairs())
def test_unifying_again_changes_nothing(pair: tuple[Term, Term]) -> None:
    a, b = pair
    axes.unify(a, b)
    before = [described(a), described(b)]
    axes.unify(a, b)
    axes.unify(b, a)
    assert [described(a), described(b)] == before


def described(term: Term) -> list[Axis | tuple[int, Reason]]:
    """The axes in order; a frozen one is its size and reason, as merging makes new ones."""
    found = axes.leaves(axes.resolve(term))
    return [(leaf.size, leaf.reason) if leaf.reason else leaf for leaf in found]


@THOROUGH
@given(SIZES.flatmap(lambda n: st.tuples(terms(n), terms(n), terms(n))), SEEDS)
def test_unification_is_transitive(triple: tuple[Term, Term, Term], seed: int) -> None:
    a, b, c = triple
    axes.unify(a, b)
    axes.unify(b, c)
    kept = some_kept(np.random.default_rng(seed), a, b, c)
    np.testing.assert_array_equal(evaluated(a, kept), evaluated(c, kept))


@THOROUGH
@given(terms(24))
def test_an_axis_takes_any_term_of_its_size(term: Term) -> None:
    cell, before = axes.axis(24), sizes(term)
    axes.unify(cell, term)
    assert sizes(cell) == sizes(term) == ([] if axes.is_frozen(axes.resolve(term)) else before)


def boundaries(factors: tuple[int, ...]) -> set[int]:
    return set(itertools.accumulate(factors, lambda a, b: a * b)) | {1}


@pytest.mark.parametrize("n", [4, 6, 8, 12, 16, 24, 30, 36])
def test_products_refine_to_their_common_factors(n: int) -> None:
    """Exactly where every boundary of one divides the next of the other, and nothing freezes."""
    pairs = list(itertools.product(factorizations(n), repeat=2))
    assert pairs
    for ours, theirs in pairs:
        a, b = (axes.product(*map(axes.axis, f)) for f in (ours, theirs))
        axes.unify(a, b)
        chain = sorted(boundaries(ours) | boundaries(theirs))
        steps = [y // x for x, y in itertools.pairwise(chain)]
        if all(y % x == 0 for x, y in itertools.pairwise(chain)):
            assert [leaf.size for leaf in axes.leaves(axes.resolve(a))] == steps
            assert not frozen_axes(a, b)
        else:
            assert frozen_axes(a, b)
        assert sizes(a) == sizes(b)


@pytest.mark.parametrize("n", range(1, 8))
def test_concats_refine_to_their_common_cuts(n: int) -> None:
    pairs = list(itertools.product(compositions(n), repeat=2))
    assert pairs
    for ours, theirs in pairs:
        a, b = (axes.concat(*map(axes.axis, parts)) for parts in (ours, theirs))
        axes.unify(a, b)
        ends = sorted({0, *itertools.accumulate(ours), *itertools.accumulate(theirs)})
        assert sizes(a) == sizes(b) == [y - x for x, y in itertools.pairwise(ends) if y - x > 1]


@pytest.mark.parametrize("pieces", [2, 3, 4])
@pytest.mark.parametrize("inner", [2, 3, 5])
def test_equal_pieces_that_meet_a_product_are_one_axis(pieces: int, inner: int) -> None:
    parts = [axes.axis(inner) for _ in range(pieces)]
    outer, shared = axes.axis(pieces), axes.axis(inner)
    axes.unify(axes.concat(*parts), axes.product(outer, shared))
    assert {axes.resolve(p) for p in parts} == {axes.resolve(shared)}
    assert axes.is_frozen(axes.resolve(outer))
    assert sizes(shared) == [inner]


def test_rows_that_keep_other_columns_cannot_be_a_product() -> None:
    """A rectangle is cut in the middle of a row: what is left over must be consistent."""
    for at in range(1, 12):
        grid = axes.product(axes.axis(3), axes.axis(4))
        two = axes.concat(axes.axis(at), axes.axis(12 - at))
        axes.unify(grid, two)
        for seed in range(5):
            kept = some_kept(np.random.default_rng(seed), grid, two)
            np.testing.assert_array_equal(evaluated(grid, kept), evaluated(two, kept))


def test_a_clash_freezes_only_what_clashes() -> None:
    a, b, c, d = map(axes.axis, (7, 4, 6, 5))
    w, x, y, z = map(axes.axis, (7, 6, 4, 5))
    axes.unify(axes.product(a, b, c, d), axes.product(w, x, y, z), "here")
    assert sizes(a, b, c, d) == sizes(w, x, y, z) == [7, 2, 2, 5]
    assert axes.resolve(a) is axes.resolve(w)
    assert axes.resolve(d) is axes.resolve(z)
    assert {leaf.reason for leaf in frozen_axes(b, c, x, y)} == {
        Reason("factors 2 and 3 cannot be aligned", "here")
    }


def test_a_clash_inside_a_concat_spares_the_other_parts() -> None:
    left, right = axes.axis(5), axes.axis(5)
    ours = axes.concat(left, axes.product(axes.axis(4), axes.axis(6)))
    theirs = axes.concat(right, axes.product(axes.axis(6), axes.axis(4)))
    axes.unify(ours, theirs)
    assert sizes(ours) == sizes(theirs) == [5, 2, 2]
    assert axes.resolve(left) is axes.resolve(right)


def test_terms_of_unequal_sizes_freeze_and_say_so() -> None:
    a, b, bystander = axes.axis(4), axes.product(axes.axis(2), axes.axis(3)), axes.axis(4)
    axes.unify(a, b, "add")
    assert {leaf.reason for leaf in frozen_axes(a, b)} == {Reason("sizes 4 and 6 meet", "add")}
    assert len(frozen_axes(a, b)) == 3
    assert sizes(bystander) == [4]


def test_the_older_axis_stays() -> None:
    old, new = axes.axis(4), axes.axis(4)
    axes.unify(new, old)
    assert axes.resolve(new) is axes.resolve(old) is old


# Freezing -----------------------------------------------------------------------------------------


@THOROUGH
@given(term_pairs())
def test_what_meets_a_frozen_term_is_frozen_for_its_reason(pair: tuple[Term, Term]) -> None:
    a, b = pair
    axes.freeze(a, Reason("first", "one"))
    axes.freeze(a, Reason("second", "two"))
    assert {leaf.reason for leaf in frozen_axes(a)} <= {Reason("first", "one"), WHY, axes.SINGLE}
    axes.unify(a, b)
    assert axes.is_frozen(axes.resolve(b))
    assert axes.is_frozen(axes.resolve(b))
    assert not free_axes(a, b)


@THOROUGH
@given(SIZES.flatmap(terms), st.data())
def test_splitting_a_frozen_term_leaves_frozen_pieces(term: Term, data: st.DataObject) -> None:
    axes.freeze(term, WHY)
    parts = axes.pieces(term, list(data.draw(st.sampled_from([*cuts(term.size)]))))
    shape = data.draw(st.sampled_from(list(factorizations(term.size))))
    regrouped = axes.regroup([term], list(shape))
    assert not free_axes(*parts, *regrouped)
    assert {leaf.reason for leaf in frozen_axes(*parts) if leaf.size} <= {WHY, axes.SINGLE}
    assert [t.size for t in regrouped] == list(shape)


def cuts(n: int) -> Iterator[tuple[int, ...]]:
    for at in range(n + 1):
        yield at, n - at
    yield (*[1] * min(n, 4), n - min(n, 4))


def test_a_frozen_axis_keeps_its_reason_through_cut_and_split() -> None:
    for make in (
        lambda t: axes.cut(t, 5),
        lambda t: axes.pieces(t, [2, 3, 7]),
        lambda t: axes.regroup([t], [3, 4]),
        lambda t: axes.regroup([t, axes.axis(2, WHY)], [8, 3]),
    ):
        made = make(axes.axis(12, WHY))
        assert {leaf.reason for leaf in frozen_axes(*made)} == {WHY}
        assert not free_axes(*made)


def test_a_partly_frozen_product_keeps_its_free_factor() -> None:
    heads, inner = axes.axis(4), axes.axis(6, WHY)
    a, b = axes.product(heads, inner), axes.axis(24)
    axes.unify(a, b)
    assert sizes(b) == [4]
    assert not axes.is_frozen(axes.resolve(b))
    assert axes.reason_of(axes.resolve(b)) is WHY


# Cutting and joining, exhaustively ----------------------------------------------------------------


@THOROUGH
@given(SIZES.flatmap(terms), st.data(), SEEDS)
def test_pieces_laid_end_to_end_are_the_whole(term: Term, data: st.DataObject, seed: int) -> None:
    at = data.draw(st.integers(0, term.size))
    head, tail = axes.pieces(term, [at, term.size - at])
    kept = some_kept(np.random.default_rng(seed), term)
    whole = evaluated(term, kept)
    np.testing.assert_array_equal(evaluated(head, kept), whole[whole < at])
    np.testing.assert_array_equal(evaluated(tail, kept), whole[whole >= at] - at)
    again = axes.concat(axes.resolve(head), axes.resolve(tail))
    np.testing.assert_array_equal(evaluated(again, kept), whole)


@pytest.mark.parametrize("parts", list(compositions(6)))
def test_pieces_of_one_axis(parts: tuple[int, ...]) -> None:
    whole = axes.axis(6)
    made = axes.pieces(whole, list(parts))
    assert [t.size for t in made] == list(parts)
    assert sizes(whole) == [n for n in parts if n > 1]
    assert evaluated(whole, {}).tolist() == list(range(6))


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (3, 4), (4, 3), (5, 2)])
def test_every_cut_of_a_grid(rows: int, columns: int) -> None:
    places = range(rows * columns + 1)
    assert places
    for at in places:
        outer, inner = axes.axis(rows), axes.axis(columns)
        head, tail = axes.cut(axes.product(outer, inner), at)
        assert (head.size, tail.size) == (at, rows * columns - at)
        row, rest = divmod(at, columns)
        uncut = [n for n in (row, rows - row - bool(rest)) if n > 1]
        assert sizes(outer) == uncut
        assert sizes(inner) == [n for n in (rest, columns - rest) if n > 1]


def test_cutting_at_the_ends_refines_nothing() -> None:
    whole = axes.axis(6)
    assert axes.cut(whole, 0)[1] is axes.cut(whole, 6)[0] is whole
    assert axes.cut(whole, 0)[0].size == axes.cut(whole, 6)[1].size == 0
    assert axes.is_frozen(axes.cut(whole, 0)[0])


# Normal forms -------------------------------------------------------------------------------------


def test_one_index_is_the_unit() -> None:
    assert axes.axis(1) is UNIT
    assert axes.product() is UNIT
    assert axes.product(UNIT, UNIT) is UNIT
    assert UNIT.size == 1
    assert axes.indices(UNIT, {}).tolist() == [0]
    assert axes.is_frozen(UNIT)
    assert axes.reason_of(UNIT) is axes.SINGLE


def test_products_and_concats_are_flat() -> None:
    a, b, c = map(axes.axis, (2, 3, 4))
    assert axes.product(a) is a
    assert axes.concat(a) is a
    grid = axes.product(axes.product(a, UNIT), axes.product(b, c))
    assert isinstance(grid, Product)
    assert grid.factors == (a, b, c)
    assert grid.size == 24
    row = axes.concat(axes.concat(a, axes.axis(0)), axes.concat(b, c))
    assert isinstance(row, Concat)
    assert row.parts == (a, b, c)
    assert row.size == 9


def test_neighbouring_frozen_parts_merge() -> None:
    free = axes.axis(3)
    row = axes.concat(axes.axis(2, WHY), UNIT, axes.axis(4), free, UNIT, UNIT)
    assert isinstance(row, Concat)
    assert [p.size for p in row.parts] == [3, 4, 3, 2]
    assert [getattr(p, "reason", None) for p in row.parts] == [WHY, None, None, axes.SINGLE]
    assert axes.concat().size == 0


@THOROUGH
@given(SIZES.flatmap(terms))
def test_resolved_terms_are_in_normal_form(term: Term) -> None:
    axes.unify(axes.axis(term.size), term)
    check_normal(axes.resolve(term))
    assert axes.resolve(axes.resolve(term)) is axes.resolve(term)


def check_normal(term: Term) -> None:
    if isinstance(term, Axis):
        assert term.bound is None
        assert term.size > 1
        return
    children = term.factors if isinstance(term, Product) else term.parts
    assert isinstance(term, Concat) <= (len(children) > 1)
    assert len(children) != 1
    for child in children:
        assert type(child) is not type(term) or child is UNIT
        if child is not UNIT:
            check_normal(child)


# Sums over axes -----------------------------------------------------------------------------------


@THOROUGH
@given(SIZES.flatmap(terms), SEEDS)
def test_projected_sums_match_numpy(term: Term, seed: int) -> None:
    """A place of an axis sums the values at the indices that removing it would remove."""
    term = axes.resolve(term)
    values = np.random.default_rng(seed).random(term.size)
    found = list(axes.project(term, values))
    assert [leaf for leaf, _ in found] == list(axes.leaves(term))
    for leaf, sums in found:
        expected = []
        for i in range(leaf.size):
            others = np.delete(np.arange(leaf.size), i)
            gone = np.setdiff1d(np.arange(term.size), axes.indices(term, {leaf: others}))
            expected.append(values[gone].sum())
        np.testing.assert_allclose(sums, expected)


def test_an_axis_that_occurs_twice_has_two_projections() -> None:
    a, b = axes.axis(2), axes.axis(3)
    values = np.arange(10.0)
    found = list(axes.project(axes.concat(a, axes.product(b, a), a), values))
    expected = [(a, [0, 1]), (b, [5, 9, 13]), (a, [12, 15]), (a, [8, 9])]
    assert [(leaf, sums.tolist()) for leaf, sums in found] == expected


# Inputs that could blow up ------------------------------------------------------------------------


def within(seconds: float, run: Callable[[], None]) -> None:
    start = time.perf_counter()
    run()
    assert time.perf_counter() - start < seconds


@pytest.mark.parametrize("size", [2, 3, 12, 127, 4096])
@pytest.mark.parametrize("shift", [1, -1])
def test_an_axis_that_meets_its_rotation_by_one_settles(size: int, shift: int) -> None:
    """All indices are one orbit: nothing can go."""
    whole = axes.axis(size)
    head, tail = axes.pieces(whole, [shift % size, size - shift % size])
    within(20, lambda: axes.unify(whole, axes.concat(tail, head), "roll"))
    assert axes.is_frozen(axes.resolve(whole))
    assert len(list(axes.leaves(axes.resolve(whole)))) <= size


@pytest.mark.parametrize(("size", "shift"), [(12, 3), (12, 8), (12, 9), (60, 24), (35, 15)])
def test_an_axis_that_meets_its_rotation_keeps_whole_orbits(size: int, shift: int) -> None:
    whole = axes.axis(size)
    head, tail = axes.pieces(whole, [shift, size - shift])
    axes.unify(whole, axes.concat(tail, head))
    assert set(sizes(whole)) == {math.gcd(size, shift)}
    kept = some_kept(np.random.default_rng(0), whole)
    found = evaluated(whole, kept)
    np.testing.assert_array_equal(np.sort((found + shift) % size), found)


@pytest.mark.parametrize(("rows", "columns"), [(64, 63), (101, 97), (2, 4095), (1000, 999)])
def test_a_coprime_transposition_settles(rows: int, columns: int) -> None:
    whole = axes.axis(rows * columns)

    def run() -> None:
        axes.regroup([whole], [rows, columns])
        axes.regroup([whole], [columns, rows])

    within(2, run)
    assert axes.is_frozen(axes.resolve(whole))


def test_a_transposed_square_that_meets_itself_is_one_axis_squared() -> None:
    rows, columns = axes.regroup([axes.axis(49)], [7, 7])
    axes.unify(axes.product(rows, columns), axes.product(columns, rows))
    assert axes.resolve(rows) is axes.resolve(columns)
    assert sizes(rows) == [7]


def test_a_long_row_of_pieces_that_meets_its_shuffle_settles() -> None:
    parts = [axes.axis(3) for _ in range(500)]
    order = np.random.default_rng(0).permutation(500)
    within(10, lambda: axes.unify(axes.concat(*parts), axes.concat(*(parts[i] for i in order))))
    kept = some_kept(np.random.default_rng(1), *parts)
    for i, j in enumerate(order):
        np.testing.assert_array_equal(evaluated(parts[i], kept), evaluated(parts[j], kept))


def test_many_cuts_of_one_axis_stay_as_many_pieces() -> None:
    whole = axes.axis(512)
    for step in (2, 3, 5, 7, 64, 100, 511):
        for start in range(0, 512 - step, step):
            axes.pieces(whole, [start, step, 512 - start - step])
    assert len(list(axes.leaves(axes.resolve(whole)))) <= 512


def test_a_term_that_would_contain_itself_freezes() -> None:
    """A product meets the same axes nested in another order, round and round."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        cells = [axes.axis(int(n)) for n in rng.choice([2, 3, 4, 6], 4)]
        for _ in range(6):
            a, b = (axes.product(*(cells[i] for i in rng.permutation(4))) for _ in range(2))
            axes.unify(a, b)
        kept = some_kept(rng, *cells)
        np.testing.assert_array_equal(evaluated(a, kept), evaluated(b, kept))


def test_an_axis_that_meets_itself_is_left_alone() -> None:
    a = axes.axis(6)
    for other in (a, axes.product(UNIT, a), axes.concat(axes.axis(0), a)):
        axes.unify(a, other)
    assert sizes(a) == [6]
    assert axes.resolve(a) is a
