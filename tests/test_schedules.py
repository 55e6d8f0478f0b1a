"""Retraining schedules: every rate against its formula, resumption, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from depth_nets import CASES
from nets import NETS
from oracle import by_row
from torch import nn

import depcut
from depcut import axes
from depcut.errors import InputError
from depcut.training.schedules import SCHEDULES, OriginalSchedule, RetrainingSchedule, schedule

STEPPED = [0.1] * 30 + [0.01] * 20 + [0.001] * 10
T = len(STEPPED)


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.SGD(groups, lr=0.1)


def run(made: RetrainingSchedule) -> list[list[float]]:
    """The rates of all groups that each step is taken with."""
    rates = []
    for _ in range(made.steps):
        rates.append([g["lr"] for g in made.optimizer.param_groups])
        made.optimizer.step()
        made.step()
    return rates


def expected(name: str, steps: int, d: float = 0.5) -> np.ndarray:
    peak = 0.1
    if name == "ft":
        return np.full(steps, STEPPED[-1])
    if name == "lrw":
        return np.array(STEPPED[T - steps :])
    ramp = steps // 10
    if name == "allr":
        peak *= np.clip(d, min(steps / T, 1), 1)
    up = peak * np.arange(ramp) / max(ramp, 1)
    x = np.arange(steps - ramp) / (steps - ramp)
    down = {
        "slr": lambda: np.array(STEPPED)[np.floor(x * T + 1e-9).astype(int)],
        "clr": lambda: peak * 0.5 * (1 + np.cos(np.pi * x)),
        "llr": lambda: peak * (1 - x),
        "allr": lambda: peak * (1 - x),
    }[name]()
    return np.concatenate([up, down])


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 37, 60])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_rate_is_the_formulas(name: str, steps: int) -> None:
    original = OriginalSchedule(STEPPED)
    made = schedule(name, optimizer(0.1, 0.02), original, steps, distance=0.5)
    rates = np.array(run(made))
    np.testing.assert_allclose(rates[:, 0], expected(name, steps), rtol=1e-12, atol=0)
    np.testing.assert_allclose(rates[:, 1], rates[:, 0] / 5, rtol=1e-12)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_rates_from_a_function_and_from_a_sequence_agree(name: str) -> None:
    both = [OriginalSchedule(STEPPED), OriginalSchedule(lambda step: STEPPED[step], T)]
    runs = [run(schedule(name, optimizer(), o, 25, distance=0.9)) for o in both]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("at", [0, 1, 3, 19, 40])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_schedule_goes_on_where_it_was(name: str, at: int) -> None:
    def made() -> RetrainingSchedule:
        return schedule(name, optimizer(0.1, 0.03), OriginalSchedule(STEPPED), 40, distance=0.8)

    whole = run(made())
    first = made()
    for _ in range(at):
        first.optimizer.step()
        first.step()
    state = json.loads(json.dumps(first.state_dict()))
    again = made()
    again.load_state_dict(state)
    assert again.get_last_lr() == first.get_last_lr()
    rest = []
    for _ in range(at, 40):
        rest.append([g["lr"] for g in again.optimizer.param_groups])
        again.optimizer.step()
        again.step()
    assert rest == whole[at:]


def test_torchs_optimizers_and_tensor_rates_work() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    adam = torch.optim.AdamW(weights, lr=torch.tensor(0.1))
    made = schedule("llr", adam, 0.1, 4)
    for _ in range(4):
        weights[0].grad = torch.ones(2)
        adam.step()
        made.step()
    assert float(adam.param_groups[0]["lr"]) == 0.0


@pytest.mark.parametrize(
    ("d", "steps", "factor"), [(0.0, 30, 0.5), (0.7, 30, 0.7), (3.0, 30, 1.0), (0.1, 120, 1.0)]
)
def test_allr_clips_between_the_share_of_steps_and_the_peak(
    d: float, steps: int, factor: float
) -> None:
    made = schedule("allr", optimizer(), OriginalSchedule(length=T, peak=0.1), steps, distance=d)
    assert made.peak == pytest.approx(0.1 * factor)


def test_allr_without_the_original_length_uses_the_distance_alone() -> None:
    assert schedule("allr", optimizer(), 0.2, 50, distance=0.25).peak == pytest.approx(0.05)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_past_the_end_is_an_error(name: str) -> None:
    made = schedule(name, optimizer(), OriginalSchedule(STEPPED), 5, distance=1.0)
    run(made)
    with pytest.raises(InputError, match="step 6 is outside of the schedule's 5 steps"):
        made.step()


@pytest.mark.parametrize(
    ("name", "original", "steps", "distance", "message"),
    [
        ("llr", 0.1, 0, None, "a schedule of 0 steps"),
        ("llr", 0.1, 2.5, None, "a schedule of 2.5 steps"),
        ("llr", 0.0, 5, None, "the peak rate is 0.0"),
        ("llr", math.nan, 5, None, "the peak rate is nan"),
        ("lrw", OriginalSchedule(STEPPED), 61, None, "the last 61 steps of .* 60 steps"),
        ("slr", 0.1, 5, None, "only their peak is known"),
        ("ft", OriginalSchedule(lambda _: 0.1), 5, None, "only their function, not T"),
        ("ft", OriginalSchedule([0.1, -1.0]), 5, None, "rate of step 1 is -1.0"),
        ("ft", OriginalSchedule([0.1], length=2), 5, None, "1 rates for 2 steps"),
        ("allr", 0.1, 5, None, "ALLR needs the relative distance"),
        ("allr", 0.1, 5, math.nan, "and it is nan"),
        ("alr", 0.1, 5, None, "no schedule 'alr'(.|\n)*did you mean 'allr'"),
        ("cosine", 0.1, 5, None, "there are ft, lrw, slr, clr, llr, allr"),
    ],
)
def test_mistakes_are_named(
    name: str, original: Any, steps: Any, distance: float | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        schedule(name, optimizer(), original, steps, distance=distance)
    assert caught.value.remedy


def test_a_state_of_another_schedule_is_refused() -> None:
    state = schedule("llr", optimizer(), 0.1, 5).state_dict()
    with pytest.raises(InputError, match="schedule is 'LLR', not 'CLR'"):
        schedule("clr", optimizer(), 0.1, 5).load_state_dict(state)
    with pytest.raises(InputError, match="steps is 5, not 6"):
        schedule("llr", optimizer(), 0.1, 6).load_state_dict(state)


# The distance ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["residual", "attention_gqa_expand", "lstm", "tied_autoencoder", "grouped"]
)
def test_the_distance_counts_every_removed_element_once(name: str) -> None:
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    plan = analysis.plan_keeping(by_row(analysis, np.random.default_rng(0)))
    keep = plan.keep()
    total, removed, n, gone = 0.0, 0.0, 0, 0
    for tensor, parameter in model.named_parameters():
        values = parameter.detach().double().numpy()
        out = np.zeros(values.shape, dtype=bool)
        for place in np.ndindex(*values.shape):
            out[place] = any(
                _is_removed(keep, analysis.coupling.dims[tensor], place, dim)
                for dim in range(values.ndim)
            )
        total, n = total + (values**2).sum(), n + values.size
        removed, gone = removed + (values[out] ** 2).sum(), gone + out.sum()
    assert gone == n - sum(p.numel() for p in plan.apply(model).parameters())
    want = np.sqrt(removed) / (np.sqrt(total) * np.sqrt(gone / n))
    assert depcut.training.relative_distance(model, plan) == pytest.approx(want, rel=1e-12)


def _is_removed(keep: Any, dims: Any, place: tuple[int, ...], dim: int) -> bool:
    """Whether an element belongs to a unit that goes, by the axes that its indices stand for."""
    terms = [axes.resolve(t) for t in dims]
    for number, kept in keep.units.items():
        group = keep.coupling.groups[number]
        unit = axes.units(terms[dim], group.axis)[place[dim]]
        if unit < 0:
            continue
        if kept.ndim == 1:
            row = kept
        else:
            at = [axes.units(t, group.row_axis)[i] for t, i in zip(terms, place, strict=True)]
            row = kept[max(at)]
        if unit not in row:
            return True
    return False


def test_a_dropped_branch_is_removed_as_a_whole() -> None:
    net = CASES["own_class"]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    plan = analysis.plan_keeping({}, dropped=[analysis.branches[0].name])
    slim = plan.apply(model)
    gone = {n for n, _ in model.named_parameters()} - {n for n, _ in slim.named_parameters()}
    assert gone
    squares = {n: float(p.detach().double().square().sum()) for n, p in model.named_parameters()}
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    removed = sum(squares[n] for n in gone) / sum(squares.values())
    share = sum(sizes[n] for n in gone) / sum(sizes.values())
    assert depcut.training.relative_distance(model, plan) == pytest.approx((removed / share) ** 0.5)


def test_nothing_removed_is_no_distance() -> None:
    net = NETS["residual"]
    model = net.build()
    plan = depcut.analyze(model, net.inputs(2)).plan_keeping({})
    assert depcut.training.relative_distance(model, plan) == 0.0


def test_the_distance_of_a_plan_from_a_file(tmp_path: Any) -> None:
    net = NETS["residual"]
    model = net.build()
    plan = depcut.analyze(model, net.inputs(2)).plan(0.4, align=1)
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    assert (
        depcut.training.relative_distance(model, loaded)
        == depcut.training.relative_distance(model, plan)
        > 0
    )
