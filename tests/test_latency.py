"""Time as a function of the counts: what is recognised, fitted, kept on disk, and met."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # noqa: F401  (its import writes a device's number into the cache folder)
import pytest
import torch
from nets import NETS, Head, conv, seeded
from torch import nn

import depcut
from depcut.allocate.choose import Chooser, Request
from depcut.allocate.lagrange import least_loss
from depcut.allocate.order import meet, order
from depcut.allocate.space import space
from depcut.analysis import Analysis
from depcut.deploy.convert import draft
from depcut.errors import BudgetError, InputError, LatencyError
from depcut.latency import cache, model, workload
from depcut.latency.align import aligned, best_alignment
from depcut.latency.designs import designs
from depcut.latency.measure import Bench, Beside
from depcut.latency.model import LatencyModel
from depcut.latency.samples import Sample, Samples
from depcut.latency.sizes import Recogniser
from depcut.latency.staircase import fit
from depcut.timing.kernels import Kernel
from depcut.timing.runtimes.sessions import SessionRunner
from depcut.timing.session_profile import kernels_of, profile


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 64), conv(64, 96), conv(96, 128), Head(128))


IMAGE = torch.zeros(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "depcut" / "latency"


# A busy machine may explain little or miss a target, and says so; no time is asserted here.
BUSY = [
    "ignore:the widths explain the measured times:UserWarning",
    "ignore:the closest of .* candidates takes:UserWarning",
]


@pytest.fixture
def analysis() -> Analysis:
    return depcut.analyze(seeded(Chain, 0), IMAGE)


def up(value: int, block: int) -> int:
    return -(-value // block) * block


def machine(counts: tuple[int, ...], noise: float = 0.0) -> Sample:
    """A made-up machine: blocks of 16 written, a copy in front of widths that are no such block."""
    widths = [3, *counts]
    kernels = []
    for number, (read, written) in enumerate(itertools.pairwise(widths)):
        if number == 2 and read % 16:
            kernels.append(Kernel("Copy", ((1, read, 8, 8),), ((1, up(read, 16), 8, 8),), 1e-6))
        seconds = 5e-6 + 2e-9 * 64 * up(written, 16) * read + 3e-9 * 64 * read
        kernels.append(
            Kernel(
                "Conv (blocked)",
                ((1, read, 8, 8), (up(written, 16), read, 3, 3)),
                ((1, up(written, 16), 8, 8),),
                seconds * (1 + noise),
            )
        )
    last = widths[-1]
    kernels.append(Kernel("Gemm", ((1, last),), ((1, 4),), 1e-6 + 1e-8 * last))
    return Sample(counts, tuple(kernels), 1.0)


def measured(rows: Any) -> Samples:
    samples = [machine(tuple(map(int, row))) for row in rows]
    totals = [sum(k.seconds for k in s.kernels) + 4e-6 for s in samples]
    return Samples(
        totals[0],
        tuple(
            Sample(s.counts, s.kernels, total / totals[0])
            for s, total in zip(samples, totals, strict=True)
        ),
    )


def fitted(analysis: Analysis) -> LatencyModel:
    rows = designs(space(analysis.coupling, 8, set()), 16)
    samples = measured(rows)
    found = fit(analysis.coupling, samples)
    return LatencyModel(
        coupling=analysis.coupling,
        cost=replace(found.cost, grid=np.full(len(analysis.groups), 8)),
        dense_seconds=samples.dense_seconds,
        errors=found.errors,
        explained=found.explained,
        slowdown=1.0,
        threads=1,
        runtime="",
        machine="",
    )


# Designs -----------------------------------------------------------------------------------------


def test_designs_begin_with_the_dense_model_and_cover_every_range(analysis: Analysis) -> None:
    rows = designs(space(analysis.coupling, 8, set()), 18)
    assert rows[0].tolist() == [g.size for g in analysis.groups]
    assert (rows[1] <= rows).all()
    for group, column in zip(analysis.groups, rows.T, strict=True):
        assert (column % 8 == 0).all()
        assert column.min() <= 0.2 * group.size
        assert np.diff(np.unique(column)).max() <= 16


@pytest.mark.parametrize(
    "name", ["split_halves_shared_module", "channel_shuffle", "attention_gqa_expand"]
)
def test_designs_can_be_planned(name: str) -> None:
    net = NETS[name]
    found = depcut.analyze(net.build(), net.inputs(2))
    rows = designs(space(found.coupling, 1, set()), 8)
    assert len(rows) == 8
    for row in rows:
        counts = zip(found.groups, row, strict=True)
        plan = found.plan_keeping({g.name: np.arange(n) for g, n in counts})
        assert plan.keep().counts.tolist() == list(row)


# Profiles ----------------------------------------------------------------------------------------


def event(name: str, micros: float, op: str = "Conv") -> dict[str, Any]:
    shapes = [{"float": [1, 3]}, {"int64": [2]}]
    arguments = {"op_name": op, "input_type_shape": shapes, "output_type_shape": shapes[:1]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": micros, "args": arguments}


def test_kernels_are_medians_of_the_runs_after_the_first() -> None:
    events = [{"cat": "Session", "name": "model_run", "dur": 9}]
    for micros in (900, 800, 3, 1, 2):
        events += [event("a_nchwc", micros), event("b", 7, "Gemm")]
    first, second = kernels_of(events, 5, "net.onnx")
    assert first == Kernel("Conv (blocked)", ((1, 3),), ((1, 3),), pytest.approx(2e-6))
    assert second.op == "Gemm"
    assert second.seconds == pytest.approx(7e-6)


@pytest.mark.parametrize(
    "names", [["a", "b", "a"], [], ["a", "b", "b", "a", "a", "b"]], ids=["odd", "none", "order"]
)
def test_runs_that_differ_are_no_measurement(names: list[str]) -> None:
    with pytest.raises(LatencyError, match="does not show the same kernels in every run") as info:
        kernels_of([event(name, 1) for name in names], 3 if len(names) > 3 else 2, "net.onnx")
    assert "where: net.onnx" in str(info.value)
    assert "of='macs'" in str(info.value)


def test_a_real_profile(tmp_path: Path) -> None:
    draft(seeded(Chain, 0), IMAGE, tmp_path / "net.onnx")
    kernels = profile(tmp_path / "net.onnx", {"input": IMAGE}, 1, seconds=0.01)
    convolutions = [k for k in kernels if k.op.startswith("Conv")]
    assert len(convolutions) == 3
    assert {k.inputs[0][1] for k in convolutions} == {3, 64, 96}
    assert all(k.seconds >= 0 for k in kernels)
    assert list(tmp_path.iterdir()) == [tmp_path / "net.onnx"]


# The same kernel in different samples ------------------------------------------------------------


def test_alignment_is_the_best_that_keeps_the_order() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        rows, columns = generator.integers(1, 6, size=2)
        similarity = generator.integers(0, 3, size=(rows, columns)).astype(float)
        found = best_alignment(similarity)
        assert list(found) == sorted(found, reverse=True)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        pairs = [(i, j) for i in range(rows) for j in range(columns) if similarity[i, j]]
        best = max(
            sum(similarity[p] for p in chosen)
            for size in range(min(rows, columns) + 1)
            for chosen in itertools.combinations(pairs, size)
            if all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(chosen))
        )
        assert sum(similarity[i, j] for i, j in found.items()) == best


def test_kernels_that_come_and_go_do_not_shift_the_others(analysis: Analysis) -> None:
    samples = measured([[64, 96, 128], [64, 40, 64], [16, 24, 32]])
    tracks = aligned(samples)
    assert [t.kernels[0].op for t in tracks] == [*["Conv (blocked)"] * 3, "Gemm"]
    assert all(t.places == (0, 1, 2) for t in tracks)
    assert [k.inputs[0][1] for k in tracks[2].kernels] == [96, 40, 24]


# Sizes -------------------------------------------------------------------------------------------


def test_sizes_are_recognised_by_their_series(analysis: Analysis) -> None:
    counts = designs(space(analysis.coupling, 8, set()), 12)
    recogniser = Recogniser(analysis.coupling, counts)
    every = tuple(range(12))
    first = counts[:, 0]
    assert recogniser.size(np.full(12, 7), every).count == {(): 7.0}
    assert recogniser.size(first, every).count == {(0,): 1.0}
    assert recogniser.size(3 * first, every).count == {(0,): 3.0}
    rounded = recogniser.size(-(-first // 16) * 16, every)
    assert (rounded.count, rounded.block) == ({(0,): 1.0}, 16)
    some = (0, 3, 4, 5, 7, 8)
    assert recogniser.size(counts[list(some), 1], some).count == {(1,): 1.0}
    assert recogniser.size(np.arange(12) ** 2 + 5, every) is None


# The fit -----------------------------------------------------------------------------------------


def test_a_known_machine_is_found_again(analysis: Analysis) -> None:
    found = fitted(analysis)
    assert np.abs(found.errors).max() < 0.02
    assert found.explained > 0.9
    generator = np.random.default_rng(5)
    for _ in range(50):
        counts = 8 * generator.integers(2, [9, 13, 17])
        true = measured([counts]).dense_seconds
        assert found.cost(counts) == pytest.approx(true, rel=0.03)


def test_the_staircase_has_the_steps_of_the_machine(analysis: Analysis) -> None:
    cost = fitted(analysis).cost
    within, beyond = cost(np.array([64, 96, 120])), cost(np.array([64, 96, 128]))
    assert within == pytest.approx(beyond, rel=0.01)  # the last layer's 120 are computed as 128
    assert cost(np.array([64, 96, 112])) < 0.95 * beyond


def test_widths_between_are_taken_for_the_next_and_said(analysis: Analysis) -> None:
    times = replace(fitted(analysis), slowdown=1.3)
    names = [g.name for g in analysis.groups]
    plans = [
        analysis.plan_keeping({n: np.arange(k) for n, k in zip(names, counts, strict=True)})
        for counts in ([40, 41, 128], [40, 48, 128], [33, 41, 127])
    ]
    says = rf"1 widths .{names[1]}. lie between .* took 1\.30 times as long"
    with pytest.warns(UserWarning, match=says):
        between = times.predict(plans[0])
    assert between == pytest.approx(1.1 * times.predict(plans[1]))
    with pytest.warns(UserWarning, match="3 widths"):
        assert times.predict(plans[2]) == pytest.approx(1.3 * times.cost(np.array([40, 48, 128])))


def test_widths_between_the_steps_are_measured_too(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_between(*arguments: Any, **_: Any) -> Samples:
        rows = arguments[3]
        next_larger = measured(-(-rows // 8) * 8)
        between = [((row % 8 > 0) & (row < rows[0])).all() for row in rows]
        assert between == [False] * 16 + [True] * 2
        return Samples(
            next_larger.dense_seconds,
            tuple(
                replace(s, counts=tuple(map(int, row)), ratio=s.ratio * (1.5 if off else 1))
                for s, row, off in zip(next_larger.samples, rows, between, strict=True)
            ),
        )

    monkeypatch.setattr(model, "measure", slow_between)
    times = analysis.latency()
    assert times.slowdown == pytest.approx(1.5, rel=0.03)
    assert len(times.errors) == 16
    assert "between multiples of 8 take 1.5" in str(times)


# Allocation --------------------------------------------------------------------------------------


def test_least_loss_stays_within_and_leaves_no_step_unspent(analysis: Analysis) -> None:
    cost = fitted(analysis).cost
    where = space(analysis.coupling, 8, set())
    chooser = Chooser(analysis.coupling, analysis.model, Request(allocation="global"))
    for share in (0.3, 0.5, 0.8):
        counts = least_loss(where, chooser.scores, cost, share * cost.total, "latency")
        assert cost(counts) <= share * cost.total
        for number, group in enumerate(analysis.groups):
            more = counts.copy()
            more[number] += 8
            assert more[number] > group.size or cost(more) > share * cost.total


def test_least_loss_is_close_to_the_best_of_all(analysis: Analysis) -> None:
    cost = fitted(analysis).cost
    where = space(analysis.coupling, 8, set())
    chooser = Chooser(analysis.coupling, analysis.model, Request(allocation="global"))
    every = np.array(list(itertools.product(*[range(8, g.size + 1, 8) for g in analysis.groups])))
    times = cost.many(every)

    def kept(counts: Any) -> float:
        shares = [
            np.sort(s)[::-1][:n].sum() / s.sum()
            for s, n in zip(chooser.scores, counts, strict=True)
        ]
        return float(sum(share**-7 for share in shares))

    for share in (0.3, 0.5, 0.8):
        budget = share * cost.total
        best = min(kept(row) for row in every[times <= budget])
        counts = least_loss(where, chooser.scores, cost, budget, "latency")
        uniform = meet(
            where, order("uniform", where, chooser.scores, cost), cost, budget, "latency"
        )
        assert kept(counts) <= 1.3 * best
        assert kept(counts) <= kept(uniform) or cost(uniform) > budget


def test_least_loss_says_what_can_be_reached(analysis: Analysis) -> None:
    cost = fitted(analysis).cost
    where = space(analysis.coupling, 8, set())
    chooser = Chooser(analysis.coupling, analysis.model, Request(allocation="global"))
    with pytest.raises(BudgetError, match=r"latency cannot be reduced to 1\.00%"):
        least_loss(where, chooser.scores, cost, 0.01 * cost.total, "latency")


# Measurements on disk ----------------------------------------------------------------------------

KEY = {"architecture": "a", "threads": 1}


def test_measurements_are_read_back_as_they_were() -> None:
    samples = measured([[64, 96, 128], [8, 8, 8]])
    assert cache.load(KEY) is None
    cache.store(KEY, samples)
    assert cache.load(KEY) == samples
    assert cache.load({**KEY, "threads": 2}) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"ratio": 1.0', '"ratio": 0.5'),
        lambda text: json.dumps({**json.loads(text), "key": {"threads": 2}}),
        lambda text: json.dumps({**json.loads(text), "content": {}}),
    ],
    ids=["cut off", "empty", "other json", "a number changed", "another key", "no content"],
)
def test_a_damaged_file_is_measured_again(damage: Any, own_cache: Path) -> None:
    cache.store(KEY, measured([[64, 96, 128], [8, 8, 8]]))
    (path,) = own_cache.iterdir()
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=f"measuring again: {path} cannot be used"):
        assert cache.load(KEY) is None


def test_no_place_to_keep_measurements(own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="measurements are not kept"):
        cache.store(KEY, measured([[64, 96, 128]]))


# A time to come to -------------------------------------------------------------------------------


@pytest.fixture
def clockwork(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Time told by the made-up machine, a tenth slower than its model says; what was measured."""
    seen: list[tuple[int, ...]] = []

    class Clock:
        dense = None

        def __init__(self, dense: nn.Module, *_: Any, **__: Any) -> None:
            self.model = dense

        def written(self, slim: nn.Module) -> nn.Module:
            return slim

        def beside(self, slim: nn.Module | None, _: int) -> Beside:
            widths = tuple(
                m.out_channels for m in (slim or self.model).modules() if isinstance(m, nn.Conv2d)
            )
            seen.append(widths)
            dense = measured([[64, 96, 128]]).dense_seconds
            found = measured([widths]).dense_seconds
            return Beside(1.0 if slim is None else 1.1 * found / dense, dense)

    monkeypatch.setattr(workload, "Bench", Clock)
    monkeypatch.setattr(Analysis, "latency", lambda self, **_: fitted(self))
    return seen


def test_a_share_of_the_time_is_met_after_a_correction(
    analysis: Analysis, clockwork: list[tuple[int, ...]]
) -> None:
    plan = analysis.plan(0.5, of="latency")
    facts = plan.settings["latency"]
    assert facts["measured_ms"] == pytest.approx(0.5 * facts["dense_ms"], rel=0.05)
    assert plan.settings["of"] == "latency"
    assert plan.settings["allocation"] == "global"
    assert facts["candidates"] == len(set(clockwork)) - 1
    json.dumps(dict(plan.settings))


def test_milliseconds_are_met(analysis: Analysis, clockwork: list[tuple[int, ...]]) -> None:
    dense = 1e3 * measured([[64, 96, 128]]).dense_seconds
    plan = analysis.plan(latency_ms=0.6 * dense, progress=False)
    assert plan.settings["latency"]["measured_ms"] == pytest.approx(0.6 * dense, rel=0.05)
    assert plan.settings["latency_ms"] == pytest.approx(0.6 * dense)
    slim = depcut.shrink(analysis.model, latency_ms=0.6 * dense, inputs=IMAGE, progress=False)
    assert type(slim) is Chain
    assert slim[0][0].out_channels < 64


def test_a_time_out_of_reach_says_what_can_be_reached(
    analysis: Analysis, clockwork: list[tuple[int, ...]]
) -> None:
    with pytest.raises(BudgetError, match=r"the smallest widths take .* ms, measured, of") as info:
        analysis.plan(0.99, of="latency")
    assert clockwork[-1] == (8, 8, 8)
    assert "ask for a ratio of at most 0." in str(info.value)
    assert "latency_ms=" in str(info.value)


def test_what_is_fast_enough_stays(analysis: Analysis, clockwork: list[tuple[int, ...]]) -> None:
    with pytest.raises(BudgetError, match="nothing has to go"):
        analysis.plan(latency_ms=1e6)


def test_a_step_too_wide_for_the_target_is_said(
    analysis: Analysis, clockwork: list[tuple[int, ...]]
) -> None:
    with pytest.warns(UserWarning, match=r"of the target: widths move in steps"):
        analysis.plan(0.2, of="latency", ignore=["0*", "1*"], align=64)


def test_uniform_allocation_meets_a_time_too(
    analysis: Analysis, clockwork: list[tuple[int, ...]]
) -> None:
    plan = analysis.plan(0.5, of="latency", allocation="uniform", align=1)
    facts = plan.settings["latency"]
    assert facts["measured_ms"] == pytest.approx(0.5 * facts["dense_ms"], rel=0.05)
    shares = [plan.kept[g.name].shape[-1] / g.size for g in analysis.groups]
    assert max(shares) - min(shares) < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "the ratio is None"),
        ({"ratio": 0.5, "latency_ms": 3}, "latency_ms= stands for a budget of its own"),
        ({"latency_ms": 3, "of": "params"}, "latency_ms= stands for a budget of its own"),
        ({"latency_ms": -3}, "latency_ms is -3"),
        ({"latency_ms": True}, "latency_ms is True"),
        ({"latency_ms": float("nan")}, "latency_ms is nan"),
        ({"ratio": 0.5, "of": "time"}, "use one of macs, params, channels, latency"),
        ({"ratio": 0.5, "of": "latency", "threads": 0}, "threads is 0"),
        ({"ratio": 0.5, "of": "latency", "allocation": "best"}, "unknown allocation 'best'"),
    ],
)
def test_bad_budgets(analysis: Analysis, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as info:
        analysis.plan(**options)
    assert says in str(info.value)


def test_too_few_samples(analysis: Analysis) -> None:
    with pytest.raises(InputError, match="samples=5"):
        analysis.latency(samples=5)


# The whole way -----------------------------------------------------------------------------------


def test_what_is_on_disk_is_not_measured_again(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr(model, "measure", lambda *arguments, **_: measured(arguments[3]))
    first = analysis.latency(samples=6)
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(model, "measure", None)  # a second measurement would fail
    assert analysis.latency(samples=6).dense_seconds == first.dense_seconds


@pytest.mark.exhaustive
@pytest.mark.filterwarnings(*BUSY)
def test_a_real_model_is_measured_once_and_met(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dense = seeded(Chain, 0)
    image = torch.zeros(1, 3, 32, 32)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    found = depcut.analyze(dense, image)
    times = found.latency(samples=6, progress=False)
    assert len(times.errors) == 6
    assert times.predict(found.plan(0.5)) < times.cost.total
    assert "onnxruntime" in str(times)
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(model, "measure", None)  # a second measurement would fail
    again = found.latency(samples=6, progress=False)
    assert again.dense_seconds == times.dense_seconds
    monkeypatch.setattr(Analysis, "latency", lambda self, **_: again)
    plan = found.plan(0.4, of="latency", progress=False)
    slim = plan.apply(dense)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in dense.parameters())
    assert all(torch.equal(before[n], v) for n, v in dense.state_dict().items())
    assert capfd.readouterr().err == ""


def test_times_that_widths_do_not_explain_are_said(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*arguments: Any, **_: Any) -> Samples:
        calm = measured(arguments[3])
        generator = np.random.default_rng(0)
        noisy = (replace(s, ratio=s.ratio * generator.choice([1, 3])) for s in calm.samples[1:])
        return Samples(calm.dense_seconds, (calm.samples[0], *noisy))

    monkeypatch.setattr(model, "measure", busy)
    with pytest.warns(UserWarning, match=r"explain the measured times to \d+% only"):
        analysis.latency()


def test_nothing_to_shrink_is_nothing_to_measure() -> None:
    with pytest.raises(BudgetError, match="nothing can be removed"):
        depcut.analyze(nn.Linear(4, 3), torch.zeros(2, 4)).latency()


def test_a_model_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def failing(*_: Any) -> Any:
        if next(calls):
            raise LatencyError("no clock", remedy="wind it")
        return (Kernel("Conv", (), (), 1e-6),)

    monkeypatch.setattr(SessionRunner, "kernels", failing)
    monkeypatch.setattr(Bench, "written", lambda self, _: self.dense)
    found = depcut.analyze(seeded(Chain, 0), torch.zeros(1, 3, 8, 8))
    with pytest.raises(LatencyError, match="7 of 8 smaller models could not be measured") as info:
        found.latency(samples=6, progress=False)
    assert "no clock" in str(info.value)
    assert "of='macs'" in str(info.value)


@pytest.mark.filterwarnings(*BUSY)
def test_a_few_that_cannot_be_measured_are_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the dense model's file in place of every other one."""
    calls = itertools.count()

    kernels = SessionRunner.kernels

    def failing_once(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise LatencyError("no clock", remedy="wind it")
        return kernels(*arguments)

    monkeypatch.setattr(SessionRunner, "kernels", failing_once)
    monkeypatch.setattr(Bench, "written", lambda self, _: self.dense)
    found = depcut.analyze(seeded(Chain, 0), torch.zeros(1, 3, 8, 8))
    with pytest.warns(UserWarning, match="1 of 8 smaller models could not be measured and are"):
        times = found.latency(samples=6, progress=False)
    assert len(times.errors) == 5
