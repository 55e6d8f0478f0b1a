"""Later calls of slim models: another mask, length, batch, precision, mode, device than captured.

A (net, later call) pair is drawn; what the dense model accepts must come out the same from the slim
one, or be refused by name, which a patched model never does. Counter-examples follow, each by name.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from later_calls import CONTEXTS, INPUTS, Pair, later, pair

pytestmark = pytest.mark.usefixtures("one_thread")

USUAL = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SWEEP = settings(
    max_examples=300, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
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
    refused = "refused" if net.generated else ""
    assert outcome.kind in ("right", refused), f"{outcome.detail}\n{net.source.text}"


def test_later_calls(nets: Nets, counts: Counter[str]) -> None:
    @USUAL
    @given(st.integers(0, 3), st.sampled_from(INPUTS), st.sampled_from(list(CONTEXTS)))
    def run(seed: int, arguments: str, context: str) -> None:
        assert_as_dense(nets, seed, arguments, context, counts)

    run()
    assert counts["refused"] <= 0.05 * counts.total()


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_many_later_calls(nets: Nets, counts: Counter[str]) -> None:
    @SWEEP
    @given(st.integers(0, 59), st.sampled_from(INPUTS), st.sampled_from(list(CONTEXTS)))
    def run(seed: int, arguments: str, context: str) -> None:
        assert_as_dense(nets, seed, arguments, context, counts)

    run()
    assert counts["refused"] <= 0.05 * counts.total()
