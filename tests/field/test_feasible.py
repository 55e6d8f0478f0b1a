"""What was refused though feasible: keyword dicts, batches of one, shared batches, shuffles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check, outputs
from test_axes import SIZES, THOROUGH, terms, within
from torch import Tensor, nn

import depcut
from depcut import axes
from depcut.axes import Axis, Term
from depcut.coupling.ties import find, settle_ties
from depcut.errors import CaptureError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")


class Core(nn.Module):
    """Two inputs of different widths, and a keyword-only number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.head((self.left(x) + self.right(y)).relu() * scale)


class Keywords(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or Core()

    def forward(self, **batch: Any) -> Tensor:
        return self.inner(**batch)


class Anything(Keywords):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)


class OneNamed(Keywords):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(x, **kwargs)


class KeywordOnly(Keywords):
    def forward(self, *, y: Tensor, x: Tensor, flag: bool | None = None) -> Tensor:
        return self.inner(x, y)


class OneDict(Keywords):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.inner(batch["x"], batch["more"]["y"][0])


def pair(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 6, generator=generator), torch.randn(batch, 4, generator=generator)


def in_order(batch: int) -> dict[str, Any]:
    x, y = pair(batch)
    return {"x": x, "y": y}


def reversed_order(batch: int) -> dict[str, Any]:
    x, y = pair(batch)
    return {"y": y, "x": x}


def with_scale(batch: int) -> dict[str, Any]:
    return {"scale": 2.0, **reversed_order(batch)}


def nested(batch: int) -> tuple[dict[str, Any]]:
    x, y = pair(batch)
    return ({"more": {"y": [y]}, "x": x},)


# Arguments by keyword -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (Keywords, in_order),
        (Keywords, reversed_order),
        (lambda: Keywords(Keywords()), with_scale),
        (Anything, reversed_order),
        (lambda: Anything(Keywords()), with_scale),
        (OneNamed, reversed_order),
        (KeywordOnly, in_order),
        (OneDict, nested),
    ],
    ids=["kwargs", "other order", "nested", "args", "args nested", "one named", "only", "one dict"],
)
def test_keyword_arguments_in_every_form(
    build: Callable[[], nn.Module], make: Callable[[int], Any]
) -> None:
    analysis = check(build().eval(), make, independent=make is not nested)
    assert analysis.program.dynamic
    assert [group.size for group in analysis.groups] == [16]


def test_a_model_of_keywords_is_exported_with_a_free_batch(tmp_path: Path) -> None:
    slim = depcut.shrink(Keywords().eval(), 0.5, reversed_order(1))
    report = depcut.export(slim, tmp_path / "slim.onnx", reversed_order(1))
    assert len(report.batches) > 1 if hasattr(report, "batches") else report.path.exists()


def test_data_whose_dicts_have_another_order_is_read() -> None:
    x, y = pair(4)
    items = [({"x": x, "more": {"y": [y]}},), {"x": x, "more": {"y": [y]}}]
    slim = depcut.shrink(OneDict().eval(), 0.5, nested(2), data=items)
    assert slim.inner.left.out_features == 8


def test_a_bare_dict_for_one_dict_argument_is_told_the_form() -> None:
    with pytest.raises(InputError, match=r"\(\{\.\.\.\},\) if it takes one dict"):
        depcut.analyze(OneDict(), in_order(2))


# A number beside a batch of one -------------------------------------------------------------------


class Denoiser(nn.Module):
    """An image and the time of a diffusion step."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.enter, self.leave = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.time, self.norm = nn.Linear(8, 16), nn.GroupNorm(4, 16)
        self.register_buffer("frequencies", torch.exp(-torch.arange(4.0)))

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        if self.form == "one number":
            assert time.numel() == 1
            time = time.reshape(1)
        elif self.form == "expanded":
            time = time.reshape(-1).expand(image.shape[0])
        angles = time[:, None] * self.frequencies
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        return self.leave(self.norm(self.enter(image) + embedded[:, :, None, None]).relu())


class TimeFirst(Denoiser):
    def forward(self, time: Tensor, image: Tensor) -> Tensor:
        return super().forward(image, time)


NUMBER = {"vector": torch.tensor([0.5]), "scalar": torch.tensor(0.5)}


@pytest.mark.parametrize("number", NUMBER)
@pytest.mark.parametrize("form", ["one number", "expanded"])
@pytest.mark.parametrize("first", [False, True])
def test_a_batch_of_one_beside_a_number(form: str, number: str, first: bool) -> None:
    time = NUMBER[number]
    kind = TimeFirst if first else Denoiser

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        image = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        return (time, image) if first else (image, time)

    model = kind(form).eval()
    slim = depcut.shrink(model, 0.5, inputs(1))
    assert slim.enter.out_channels < 16
    image = depcut.analyze(model, inputs(1)).program.inputs[int(first)]
    assert isinstance(image.meta["val"].shape[0], torch.SymInt)
    for batch in (1, 3):
        assert outputs(slim, inputs(batch))[0].shape == (batch, 3, 4, 4)


class Weighted(nn.Module):
    """Doubled, the weight would broadcast against the one column of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.body(x) * weight


def test_a_number_that_would_broadcast_is_not_taken_for_a_batch() -> None:
    analysis = depcut.analyze(Weighted(), (torch.randn(1, 6), torch.tensor([0.5])))
    assert [tuple(t.shape) for t in analysis.program.args] == [(2, 6), (1,)]


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.body(x + position)


def test_a_row_for_the_whole_call_is_not_taken_for_a_batch() -> None:
    """One row of six numbers looks like a batch of one; only the model tells that it is none."""
    analysis = depcut.analyze(Positions(), (torch.randn(1, 5, 6), torch.randn(1, 6)))
    assert [tuple(t.shape) for t in analysis.program.args] == [(2, 5, 6), (1, 6)]
    assert analysis.program.dynamic


def test_a_number_beside_a_batch_of_one_in_a_file(tmp_path: Path) -> None:
    slim = depcut.shrink(
        Denoiser("one number").eval(), 0.5, (torch.randn(1, 3, 4, 4), NUMBER["vector"])
    )
    report = depcut.export(
        slim, tmp_path / "slim.onnx", (torch.randn(1, 3, 4, 4), NUMBER["vector"])
    )
    assert report.path.exists()


# One batch of several inputs ----------------------------------------------------------------------


class Flow(nn.Module):
    """Two inputs through one encoder as one batch, after a check that both are equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        if repr(one.shape) != repr(two.shape):
            raise ValueError(f"{one.shape} and {two.shape}")
        first, second = self.encoder(torch.cat([one, two])).chunk(2)
        return first - second


@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_that_are_joined_share_one_batch(batch: int) -> None:
    model = Flow().eval()
    x = torch.randn(batch, 6), torch.randn(batch, 6)
    analysis = depcut.analyze(model, x)
    assert analysis.program.dynamic
    assert "note: the inputs were captured with one batch size" in str(analysis)
    slim = depcut.shrink(model, 0.5, x)
    assert slim.encoder[0].out_features == 8
    assert outputs(slim, (torch.randn(5, 6), torch.randn(5, 6)))[0].shape == (5, 3)


class Paired(Flow):
    """The size of the first half is computed from both batches, and compared with an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 3

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        first = self.encoder(torch.cat([one, two])).chunk(2)[0]
        first = first.unsqueeze(1).reshape(one.shape[0], 1, -1)
        if first.shape != (one.shape[0], 1, self.width):
            raise ValueError(f"the first half has the shape {first.shape}")
        return first


def test_a_size_computed_from_two_batches_equals_an_attribute() -> None:
    slim = depcut.shrink(Paired().eval(), 0.5, (torch.randn(1, 6), torch.randn(1, 6)))
    assert slim.encoder[0].out_features == 8


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "equal": lambda rows, own: rows == own,
    "not other": lambda rows, own: not rows != own,  # noqa: SIM202  another comparison is meant
    "at most": lambda rows, own: rows <= own,
    "at least": lambda rows, own: own * 1.0 >= rows,
}


class Counted(nn.Module):
    """The branch depends on the number of rows and an attribute."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.rows, self.order = 2, order
        self.few, self.many = nn.Linear(6, 16), nn.Linear(6, 8)
        self.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        is_few = COMPARISONS[self.order](rows, self.rows)
        return self.heads[0](self.few(x).relu()) if is_few else self.heads[1](self.many(x).relu())


@pytest.mark.parametrize("order", COMPARISONS)
def test_a_symbolic_size_is_compared_with_an_attribute(order: str) -> None:
    """Otherwise the graph is that of the branch which the example call does not take."""
    analysis = depcut.analyze(Counted(order).eval(), torch.randn(2, 6))
    assert analysis.program.dynamic
    assert "few.weight" not in analysis.program.unused
    assert "many.weight" in analysis.program.unused


class NoSymbol(nn.Module):
    """Its code takes no symbolic number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x.shape[0], int):
            raise TypeError(f"{x.shape[0]} rows")
        return self.body(x)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_that_must_be_a_number_is_fixed_and_said_so(batch: int) -> None:
    model, x = NoSymbol().eval(), torch.randn(batch, 6)
    analysis = depcut.analyze(model, x)
    assert not analysis.program.dynamic
    assert analysis.program.args[0].shape == (batch, 6)
    assert analysis.macs == 6 * 16 + 16 * 3
    assert "other batch sizes are not checked" in " ".join(str(analysis).split())
    slim = depcut.shrink(model, 0.5, x)
    assert "other batch sizes are not checked" in str(depcut.report(slim))
    assert slim.body[0].out_features == 8


def test_a_model_that_traces_in_no_way_is_refused_for_its_first_reason() -> None:
    class Branching(Flow):
        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return super().forward(one, two) if one.sum() > 0 else one

    with pytest.raises(CaptureError, match=r"data-dependent|GuardOnDataDependent|symbolic"):
        depcut.analyze(Branching(), (torch.randn(2, 6), torch.randn(2, 6)))


# Shuffles of halves -------------------------------------------------------------------------------


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    apart = x.view(batch, groups, channels // groups, height, width)
    return apart.transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """One half through a convolution, the other past it; then both interleaved."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.branch = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        past, through = x.chunk(2, 1)
        if self.first:
            past, through = through, past
        return shuffled(torch.cat([past, self.branch(through).tanh()], 1), 2)


class ShuffleNet(nn.Module):
    def __init__(self, width: int, units: int, first: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.units = nn.Sequential(*(ShuffleUnit(width, first) for _ in range(units)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x).relu()).mean((2, 3)))


def test_halves_of_odd_size_that_are_shuffled() -> None:
    """28 channels, in the third unit halves of 7: the middle one stays, groups of 3 beside it."""
    analysis = check(ShuffleNet(28, 3).eval(), image)
    assert {group.size for group in analysis.groups} == {3}
    assert len({group.tied for group in analysis.groups}) == 1


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(("units", "first"), [(2, True), (3, False), (3, True)])
def test_halves_that_are_shuffled_again_and_again(units: int, first: bool) -> None:
    analysis = check(ShuffleNet(16, units, first).eval(), image)
    assert {group.size for group in analysis.groups} == {16 // 2**units}
    assert len({group.tied for group in analysis.groups}) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "kept"),
    [
        ((4, 6), (6, 4), [2, 2]),
        ((4, 3), (6, 2), [2]),
        ((3, 4), (2, 6), [2]),
        ((5, 4, 9), (5, 6, 6), [5, 2, 3]),
        ((3, 2), (2, 3), []),
    ],
)
def test_views_that_clash_keep_what_they_have_in_common(
    ours: tuple[int, ...], theirs: tuple[int, ...], kept: list[int]
) -> None:
    """Outside and inside of the factors that cannot be aligned."""
    a, b = (axes.product(*map(axes.axis, factors)) for factors in (ours, theirs))
    axes.unify(a, b)
    for term in (a, b):
        assert [x.size for x in axes.leaves(axes.resolve(term)) if not x.reason] == kept


class Regrouped(nn.Module):
    """Channels scaled as a matrix of one shape, then as one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 1), nn.Linear(24, 5)
        self.one, self.other = nn.Parameter(torch.rand(4, 6)), nn.Parameter(torch.rand(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().mean((2, 3))
        for scale in (self.one, self.other):
            x = (x.unflatten(1, tuple(scale.shape)) * scale).flatten(1)
        return self.head(x)


def test_channels_viewed_as_matrices_of_two_shapes() -> None:
    analysis = check(Regrouped().eval(), image, alone=True)
    assert sorted(group.size for group in analysis.groups) == [2, 2]


# Ties ---------------------------------------------------------------------------------------------


@settings(THOROUGH, max_examples=100)
@given(SIZES.flatmap(lambda n: st.lists(terms(n), min_size=2, max_size=4)), st.data())
def test_tied_terms_keep_equally_many(tied: list[Term], data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 1))):
        axes.unify(tied[0], tied[-1])
    pairs = [[a, b] for a, b in itertools.pairwise(tied)]
    parent = settle_ties(pairs)
    free = dict.fromkeys(leaf for t in tied for leaf in axes.leaves(axes.resolve(t)))
    classes: dict[Axis, int] = {}
    for leaf in free:
        if leaf.reason is None:
            root = find(parent, leaf)
            assert root.size == leaf.size
            classes.setdefault(root, data.draw(st.integers(1, leaf.size)))
    counts = {axes.count(axes.resolve(t), lambda a: classes[find(parent, a)]) for t in tied}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "kept"),
    [
        (((3,), (2,), (3,)), ((8,),), [3, 2, 3]),
        (((2,), (2,), (4,)), ((2,), (2,), (2,), (2,)), [2, 2, 2, 2]),
        (((4,), (2,), (2,)), ((2,), (4,), (2,)), [4, 2, 2]),
        (((2, 3), (5,)), ((5,), (2, 3)), [2, 3, 5]),
        (((2, 3), (4,)), ((6,), (4,)), [2, 3, 4]),
    ],
)
def test_terms_that_are_tied_stay_free(
    ours: tuple[tuple[int, ...], ...], theirs: tuple[tuple[int, ...], ...], kept: list[int]
) -> None:
    """Parts in another order, of other sizes, or products beside axes: nothing has to freeze."""
    a, b = (
        axes.concat(*(axes.product(*map(axes.axis, factors)) for factors in parts))
        for parts in (ours, theirs)
    )
    settle_ties([[a, b]])
    assert [leaf.size for leaf in axes.leaves(axes.resolve(a)) if leaf.reason is None] == kept
    assert not any(leaf.reason for leaf in axes.leaves(axes.resolve(b)))


def test_a_long_chain_of_ties_settles_in_linear_time() -> None:
    """What refines the last of them refines all, one after the other, back to the first."""
    chain: list[Term] = [axes.axis(16) for _ in range(2000)]
    chain.append(axes.concat(axes.axis(4), axes.product(axes.axis(2), axes.axis(6))))
    within(5, lambda: settle_ties([[a, b] for a, b in itertools.pairwise(chain)]))
    assert len(list(axes.leaves(axes.resolve(chain[0])))) == 3
