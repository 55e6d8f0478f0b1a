"""Work grows linearly with depth, at every entry point, counted and not timed."""

from __future__ import annotations

import functools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch
from deep_nets import ENTRIES, NETS, Deep, Feed, Subject, subject
from depth_nets import CASES
from nets import normal, seeded
from selection import swept
from torch import Tensor, fx, nn
from torch.nn import functional

import depcut
from depcut.allocate import depth as search
from depcut.allocate import judges
from depcut.allocate.savings import Savings
from depcut.branches.branch import bypass
from depcut.calibration.sensitivity import sensitivities
from depcut.calibration.sites import find_sites
from depcut.graph.liveness import Losses, gone, live_nodes
from depcut.graph.reach import Ancestry, Ways
from depcut.plan.cost import ITEMS, NOTHING, dense_total
from depcut.reference.run import ReferenceRun
from depcut.repair import compensate as repair
from depcut.scores import scaled_flow, score, synaptic
from depcut.verify import compare, verify

PACKAGE = str(Path(depcut.__file__).parent)
QUICK, DEEP = (4, 8, 16), (25, 50, 100)
SIZE = 8
SLACK = 0.02  # of the growth of all work: what one function may do beyond twice as much


@contextmanager
def lines() -> Iterator[Counter[CodeType]]:
    """Lines of the package that run within the context, by function."""
    counts: Counter[CodeType] = Counter()

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            counts[frame.f_code] += 1
        return inside

    def start(frame: FrameType, _event: str, _: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        yield counts
    finally:
        sys.settrace(before)


@functools.cache
def analysed(net: str, blocks: int) -> Subject:
    return subject(net, blocks)


def work(entry: str, net: str, blocks: int) -> Counter[CodeType]:
    call = ENTRIES[entry](analysed(net, blocks))
    with lines() as counts:
        call()
    return counts


def excesses(small: Counter[Any], middle: Counter[Any], large: Counter[Any]) -> dict[str, str]:
    """Functions that do more than twice as much for the second doubling as for the first."""
    growth = large.total() - middle.total()
    out = {}
    for code in large:
        first, second = middle[code] - small[code], large[code] - middle[code]
        if second - 2 * first > SLACK * growth:
            place = f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"
            out[place] = f"{small[code]}, {middle[code]}, {large[code]} lines"
    return out


def check(entry: str, net: str, depths: tuple[int, int, int]) -> None:
    work(entry, net, depths[0])  # what is read once a process (sources) is no part of the growth
    small, middle, large = (work(entry, net, n) for n in depths)
    assert excesses(small, middle, large) == {}
    first, second = middle.total() - small.total(), large.total() - middle.total()
    assert 0 < second <= 2.2 * first


@pytest.fixture(autouse=True)
def as_many_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for a depth judges as many plans at every depth, so that they can be compared."""
    monkeypatch.setattr(search, "_FIRST", 3)
    monkeypatch.setattr(search, "_LATER", 0)


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding makes of a depth decides whether a result is compared in double, too."""
    monkeypatch.setattr(compare, "CERTAIN", math.inf)
    monkeypatch.setattr(compare, "_CERTAIN_INSIDE", math.inf)


@pytest.mark.parametrize(
    "entry",
    [
        "plan, magnitude",
        "plan, obs",
        "plan_depth",
        "apply_depth",
        "compensate",
        "distillation",
    ],
)
def test_work_grows_linearly(entry: str, one_thread: None) -> None:
    check(entry, "attention", QUICK)


@pytest.mark.parametrize(
    ("entry", "net"), swept(((entry, net) for net in NETS for entry in ENTRIES), 100)
)
def test_work_grows_linearly_to_100_blocks(entry: str, net: str, one_thread: None) -> None:
    check(entry, net, DEEP)


def test_the_counter_sees_quadratic_work() -> None:
    linear, quadratic = (compile(name, f"{name}.py", "exec") for name in ("linear", "quadratic"))
    counts = [Counter({linear: 50 * n, quadratic: n * n}) for n in QUICK]
    assert [place.split(":")[0] for place in excesses(*counts)] == ["quadratic.py"]


def test_the_search_for_a_depth_judges_a_bounded_number_of_plans(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.undo()
    judged: list[int] = []
    plain = judges.outputs_of
    monkeypatch.setattr(judges, "outputs_of", lambda *a: judged.append(1) or plain(*a))
    analysed("attention", 12).plan(depth=True)
    assert len(judged) <= 1 + 2 * (search._FIRST + 2 * search._LATER)


# Silently wrong code ------------------------------------------------------------------------------


class Scaled(Feed):
    """Divides by a number that numpy computes from a width, which nothing can see."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        return x + self.down(hidden / float(np.sqrt(hidden.shape[-1])))


class Insistent(Feed):
    """Refuses any width but the one that it was made with."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        if int(np.int64(hidden.shape[-1])) != SIZE:
            raise ValueError("another width")
        return x + self.down(hidden)


@pytest.mark.parametrize("kind", [Scaled, Insistent])
def test_modules_with_wrong_code_are_found_together(
    kind: type[Feed], monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    blocks = [kind(SIZE) for _ in range(5)]
    model = seeded(lambda: Deep(nn.Linear(6, SIZE), blocks, nn.Linear(SIZE, 4)), 0)
    analysis = depcut.analyze(model, normal(2, 6))
    ups = {g.name: range(SIZE // 2) for g in analysis.groups if g.name.endswith("up")}
    plan = analysis.plan_keeping(ups)
    runs: list[int] = []
    plain = verify.culprits
    monkeypatch.setattr(verify, "culprits", lambda *a: runs.append(1) or plain(*a))
    slim = plan.apply(model)
    assert len(runs) == 1
    report = depcut.report(slim)
    assert {*report.generated, *report.patched} == {f"blocks.{i}" for i in range(5)}
    assert torch.isfinite(slim(normal(2, 6))).all()


# Passes over the data -----------------------------------------------------------------------------


def nodes_run(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[int, int]:
    """Operators of the captured graph that a call executes: without, and with, gradients."""
    counts = [0, 0]
    plain = ReferenceRun.call

    def counted(self: ReferenceRun, *args: Any) -> Any:
        counts[torch.is_grad_enabled()] += 1
        return plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceRun, "call", counted)
        call()
    return counts[0], counts[1]


def operators(it: Subject) -> int:
    return sum(n.op == "call_function" for n in it.analysis.program.graph.graph.nodes)


@pytest.mark.parametrize(("blocks", "memory"), [(2, "4GiB"), (8, 1), (24, 1)])
def test_obs_takes_one_pass_with_gradients_and_at_most_one_before(
    blocks: int, memory: str | int, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    it, batches = analysed("attention", blocks), 2
    data = it.analysis.calibrate(it.data(), progress=False, memory=memory)
    call = functools.partial(score, "obs", it.analysis.coupling, it.model, 0, data)
    plain, with_gradients = nodes_run(monkeypatch, call)
    assert with_gradients == operators(it) * batches
    assert (plain == 0) if memory != 1 else (0.9 * with_gradients < plain <= with_gradients)


@pytest.mark.parametrize(("blocks", "memory"), [(2, "4GiB"), (8, 1), (24, 1)])
def test_compensation_reads_every_batch_once_in_either_graph(
    blocks: int, memory: str | int, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    it, batches = analysed("attention", blocks), 2
    plan = it.plan(allocation="uniform")  # no layer is left whole
    keep = plan.keep()
    calibration = it.analysis.calibrate(it.data(), progress=False, memory=memory)
    slim = plan.apply(it.model)
    call = functools.partial(repair.compensate, slim, it.model, keep, calibration)
    # Only the first batch goes beyond the last weight, which is the last operator of these nets.
    passes = 2 * batches
    # Dense outputs that weights are solved for, one layer a block and the head; the walk goes on
    # with those that it can keep, and those of the head end it.
    solved_for = batches * (1 + (blocks if memory == 1 else 0))
    assert nodes_run(monkeypatch, call) == (operators(it) * passes - (passes - 1) + solved_for, 0)


@pytest.mark.parametrize("blocks", [4, 12])
def test_sensitivities_read_every_batch_once(
    blocks: int, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    it = analysed("attention", blocks)
    calibration = it.analysis.calibrate(it.data(), progress=False)
    features = {s.node: s.family.result for s in find_sites(it.analysis.coupling)}
    call = functools.partial(sensitivities, it.analysis.coupling, it.model, calibration, features)
    assert nodes_run(monkeypatch, call) == (0, operators(it) * len(calibration.batches))


# SynFlow ------------------------------------------------------------------------------------------


class Growing(nn.Module):
    """Residual branches that multiply the stream, without a norm."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, SIZE), nn.Linear(SIZE, 4)
        self.ups = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def growing(blocks: int, factor: float) -> depcut.Analysis:
    model = seeded(lambda: Growing(blocks), 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor)
    return depcut.analyze(model, normal(2, 6))


def test_synflow_of_a_net_whose_flow_overflows(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(synaptic, "ROUNDS", 4)
    analysis = growing(40, 1e5)  # 10^10 a block: 10^400 at the end
    scores = score("synflow", analysis.coupling, analysis.model, 0)
    assert all(np.isfinite(s).all() for s in scores)
    assert len({float(v) for s in scores for v in s}) > len(scores)


def test_rescaling_changes_no_score(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(synaptic, "ROUNDS", 10)
    for analysis in (growing(4, 3.0), analysed("attention", 6).analysis):
        model = analysis.model
        plain = score("synflow", analysis.coupling, model, 0)
        with monkeypatch.context() as patch:
            patch.setattr(scaled_flow, "_BITS", 1)
            scaled = score("synflow", analysis.coupling, model, 0)
        assert all(np.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(plain, scaled, strict=True))


# The toolkit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_a_whole_pass(name: str) -> None:
    case = CASES[name]
    analysis = depcut.analyze(case.build(), case.inputs(2))
    program, found = analysis.program, analysis.residuals
    losses, live = Losses(program), live_nodes(program, {})
    chosen = [(b.name,) for b in found.branches] + [b.branches for b in found.blocks]
    chosen.append(tuple(b.name for b in found.branches))
    assert found.branches
    for names in chosen:
        through = bypass(found.named(names))
        assert losses(through) == live - live_nodes(program, through)
        dead = gone(program, through)
        for of in ITEMS:
            whole, left = (dense_total(ITEMS[of](analysis.coupling, g)) for g in (NOTHING, dead))
            assert Savings(analysis.coupling, found, of)(names) == whole - left


class InPlace(nn.Module):
    """Branches that write in place, one of them to the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        hidden = self.b(x)
        hidden[:, :2].mul_(2)
        hidden.relu_()
        x = x + hidden
        x += functional.relu_(self.c(x))
        x.clamp_(-3, 3)
        return self.a(x)


def test_losses_follow_writes_in_place() -> None:
    analysis = depcut.analyze(seeded(InPlace, 0), normal(2, SIZE))
    program = analysis.program
    losses, live = Losses(program), live_nodes(program, {})
    adds = [n for n in program.graph.graph.nodes if str(n.target).startswith("aten.add")]
    assert len(adds) == 2
    for add in adds:
        for stays in add.args[:2]:
            assert losses({add: stays}) == live - live_nodes(program, {add: stays})


@pytest.mark.parametrize("seed", range(5))
def test_reach_answers_as_sets_of_ancestors_do(seed: int) -> None:
    draw = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(30):
        read = draw.sample(nodes[-6:], min(len(nodes), draw.randint(1, 3)))
        nodes.append(graph.call_function(torch.add, tuple(read)))
    nodes.append(graph.output(tuple(draw.sample(nodes[-8:], 3))))
    above: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        above[node] = {node}.union(*(above[s] for s in node.all_input_nodes))
    ancestry, ways = Ancestry(nodes), Ways(nodes)
    assert len(nodes) == 32
    for node in nodes:
        for source in nodes:
            assert ancestry.stems_from(node, source) == (source in above[node])
            between = {n for n in above[node] if source in above[n]}
            assert ancestry.between(node, source) == between
        live: set[fx.Node] = set()
        for other in reversed(nodes):
            if other.op == "output" or (other in live and other is not node):
                live.update(other.all_input_nodes)
        for other in nodes[:-1] if node.op != "output" else ():
            assert ways.avoid(other, node) == (other in live) or other is node
