"""Later calls of slim models: another mask, length, batch, precision, mode, device than captured.

A (net, later call) pair is drawn; what the dense model accepts must come out the same from the
slim one, or be refused by name. A patched model refuses nothing but branches that no example call
ran and that name sizes of the dense model. Counter-examples follow, each by name.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from later_calls import CONTEXTS, INPUTS, Pair, later, mesh, pair
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import depcut
from depcut.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

USUAL = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SWEEP = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
QUICK = sorted({*CONTEXTS} - {"shrink", "export"})  # those take as long as all others
Nets = Callable[[int], Pair]


@pytest.fixture
def nets(tmp_path: Path) -> Nets:
    """Drawn nets by number, each made once."""

    @functools.cache
    def made(seed: int) -> Pair:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of nested tensors
            return pair(random.Random(seed).choice, tmp_path)

    return made


@pytest.fixture
def counts(capsys: pytest.CaptureFixture[str]) -> Iterator[Counter[str]]:
    """Counts outcomes and prints them at the end."""
    counted: Counter[str] = Counter()
    yield counted
    with capsys.disabled():
        print("\nlater calls: " + ", ".join(f"{kind} {n}" for kind, n in counted.most_common()))


def assert_as_dense(nets: Nets, seed: int, given: str, context: str, counts: Counter[str]) -> None:
    net = nets(seed)
    outcome = later(net, given, context)
    assume(outcome.kind != "skipped")
    counts[outcome.kind] += 1
    guarded = "no example call has run it" in outcome.detail
    refused = "refused" if net.generated or guarded else ""
    assert outcome.kind in ("right", refused), f"{outcome.detail}\n{net.source.text}"


def test_later_calls(nets: Nets, counts: Counter[str]) -> None:
    @USUAL
    @given(st.sampled_from([4, 31, 34]), st.sampled_from(INPUTS), st.sampled_from(QUICK))
    def run(seed: int, arguments: str, context: str) -> None:
        assert_as_dense(nets, seed, arguments, context, counts)

    run()
    assert counts["refused"] <= 0.05 * counts.total()


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_many_later_calls(nets: Nets, counts: Counter[str]) -> None:
    @SWEEP
    @given(
        st.sampled_from(range(0, 60, 2)), st.sampled_from(INPUTS), st.sampled_from(list(CONTEXTS))
    )
    def run(seed: int, arguments: str, context: str) -> None:
        assert_as_dense(nets, seed, arguments, context, counts)

    run()
    assert counts["refused"] <= 0.05 * counts.total()


# Counter-examples, each by what was wrong ---------------------------------------------------------


class Positions(nn.Module):
    """A table of which a longer input reads more."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 16, 8))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table[:, : x.size(1)]
        return x + self.down(self.up(x).relu())


class RootOfShape(nn.Module):
    """A root, by a name of its own, of a size of what a chain of operators divides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        return (self.q(x) @ k.transpose(-2, -1) / sqrt(k.shape[-1])).softmax(-1) @ x


class Leaving(nn.Module):
    """Makes fewer calls where one number is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 2
        self.q, self.k, self.out = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(16, 8)

    def repeated(self, k: Tensor) -> Tensor:
        if self.times == 1:
            return k
        return k.repeat_interleave(self.times, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(x.size(0), x.size(1), -1, 4).transpose(1, 2)
        k = self.repeated(self.k(x).view(x.size(0), x.size(1), -1, 4).transpose(1, 2))
        attended = (q @ k.transpose(-2, -1) / sqrt(4)).softmax(-1) @ k
        return self.out(attended.transpose(1, 2).reshape(x.size(0), x.size(1), 4 * 4))


class Branching(nn.Module):
    """A branch on a mask, with the numbers of the code that runs, by name or typed in."""

    def __init__(self, typed: bool) -> None:
        super().__init__()
        self.typed = typed
        self.qkv, self.out = nn.Linear(8, 3 * 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, _ = x.shape
        heads = 4
        q, k, v = self.qkv(x).view(n, length, 3, heads, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 2
        if mask is not None and self.typed:
            scores = scores.view(n, 4, length, length) + mask
        elif mask is not None:
            scores = scores.view(n, heads, length, length) + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, 16))


class Asserting(nn.Module):
    """Code that checks a width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        assert hidden.shape[-1] == 12
        return self.down(hidden)


class OtherLayout(nn.Module):
    """A view of what is contiguous in the capture and may not be in a run."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 3 * 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).contiguous().view(n, length, 16))


def slim_of(net: nn.Module, *given: Tensor) -> nn.Module:
    """A net without the latter half of the units of each group, which are made dead first."""
    analysis = depcut.analyze(net.eval(), given)
    kept = {g.name: range(g.size // 2) for g in analysis.groups}
    plan = analysis.plan_keeping(kept)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            stays = torch.zeros_like(parameter)
            stays[mesh(parameter, plan.tensor_indices()[name])] = 1
            parameter.mul_(stays)
    return depcut.compact(net, given)


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
LONGER = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "kind",
    [Positions, RootOfShape, Leaving, Asserting, OtherLayout],
    ids=lambda kind: kind.__name__,
)
def test_a_longer_input_comes_out_as_from_the_dense_model(kind: type[nn.Module]) -> None:
    net = kind()
    slim = slim_of(net, X)
    assert not depcut.report(slim).generated
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(slim(LONGER), net(LONGER))


def test_rows_of_a_table_that_the_example_does_not_read_stay() -> None:
    analysis = depcut.analyze(Positions(), X)
    places = {(m.tensor, m.dim) for group in analysis.groups for m in group.members}
    assert ("up.weight", 0) in places
    assert ("table", 1) not in places


def test_a_branch_that_did_not_run_gets_the_numbers_of_the_same_names() -> None:
    net = Branching(typed=False)
    slim = slim_of(net, X)
    mask = torch.randn(9, 9)
    torch.testing.assert_close(slim(LONGER, mask), net(LONGER, mask))
    torch.testing.assert_close(slim(LONGER), net(LONGER))


def test_a_branch_that_did_not_run_with_typed_numbers_refuses() -> None:
    net = Branching(typed=True)
    slim = slim_of(net, X)
    with pytest.raises(InputError, match=r"in a branch of Branching\.forward"):
        slim(LONGER, torch.randn(9, 9))
    assert "_depcut_not_run" in str(depcut.report(slim))
    torch.testing.assert_close(slim(LONGER), net(LONGER))


def test_an_encoder_with_padding_in_its_example_is_not_generated() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    net = Encoding(nn.TransformerEncoder(layer, 1))
    padding = torch.arange(6)[None] >= torch.tensor([[6], [4]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of nested tensors
        slim = slim_of(net, X, padding)
        assert not depcut.report(slim).generated
        torch.testing.assert_close(slim(X, padding), net(X, padding))
        torch.testing.assert_close(slim(LONGER), net(LONGER))


class Encoding(nn.Module):
    """An encoder with an optional padding mask."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        encoded: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return encoded
