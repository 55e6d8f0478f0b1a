"""Random nets against the oracle: eight by default, a hundred and fifty with `-m sweep`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Verbosity, given, settings
from oracle import check
from random_nets import (
    Conv,
    Grouped,
    Hidden,
    PadShortcut,
    RandomNet,
    Residual,
    Rotate,
    Shuffle,
    View,
    random_nets,
)

pytestmark = pytest.mark.usefixtures("one_thread")

USUAL = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SWEEP = settings(
    max_examples=30,
    deadline=None,
    print_blob=True,
    verbosity=Verbosity.normal,
    suppress_health_check=list(HealthCheck),
)
DOUBLE = 1e-9  # random nets are built in double precision


@pytest.fixture
def seen(capsys: pytest.CaptureFixture[str]) -> Iterator[Counter[str]]:
    """Counts what the nets were made of and prints it at the end."""
    counts: Counter[str] = Counter()
    yield counts
    nets, groups = counts.pop("nets", 0), counts.pop("groups", 0)
    blocks = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
    with capsys.disabled():
        print(f"\n{nets} random nets, {groups} groups; {blocks}")


def assert_sound(net: RandomNet, counts: Counter[str]) -> None:
    analysis = check(net.build(), net.inputs, independent=net.exact, tolerance=DOUBLE)
    counts.update(["nets", *net.kinds()])
    counts["groups"] += len(analysis.groups)


def test_random_nets(seen: Counter[str]) -> None:
    @USUAL
    @given(random_nets())
    def run(net: RandomNet) -> None:
        assert_sound(net, seen)

    run()


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_many_random_nets(seen: Counter[str]) -> None:
    @SWEEP
    @given(random_nets())
    def run(net: RandomNet) -> None:
        assert_sound(net, seen)

    run()


# Counter-examples that were found, as they were printed, and a few suspects.
NAMED = {
    "shuffle_after_groups": RandomNet((Grouped(3, 2), Shuffle(3, 2), Grouped(2, 3))),
    "rotate_inside_residual": RandomNet((Conv(6), Residual((Rotate(3),)), Rotate(2))),
    "pad_then_repeat": RandomNet((PadShortcut(2), View("repeated", 2), View("turned", 3))),
    "interleave_then_flatten": RandomNet((View("interleaved", 2),), (Hidden(5),), flatten=True),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_net(name: str) -> None:
    assert_sound(NAMED[name], Counter())
