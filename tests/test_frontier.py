"""Frontiers: the plans that `plan` makes, of units that are scored once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, normal, seeded
from torch import nn

import depcut
from depcut.errors import BudgetError, InputError
from depcut.frontiers.frontier import Frontier

RATIOS = (0.2, 0.4, 0.6)


def net() -> nn.Module:
    layers = [nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 5)]
    return seeded(lambda: nn.Sequential(*layers), 0)


MODEL = net()
DATA = [normal(16, 6) for _ in range(3)]


@pytest.fixture(scope="module")
def analysis() -> depcut.Analysis:
    return depcut.analyze(MODEL, normal(2, 6))


@pytest.fixture(scope="module")
def found(analysis: depcut.Analysis) -> Frontier:
    return analysis.frontier(RATIOS, data=DATA, align=1, progress=False)


def test_each_plan_is_that_of_its_ratio(analysis: depcut.Analysis, found: Frontier) -> None:
    assert [row.ratio for row in found] == [*RATIOS]
    for row in found:
        alone = analysis.plan(row.ratio, data=DATA, align=1, progress=False)
        assert row.plan.digest == alone.digest
        assert row.plan.settings == alone.settings
        assert (row.macs, row.params) == (round(alone.macs), round(alone.params))
    assert found.settings == {"of": "macs", "score": "obs", "allocation": "global"}


def test_the_criterion_runs_once_and_the_data_is_read_once(analysis: depcut.Analysis) -> None:
    calls, passes = [], []

    def counted(coupling: Any, model: nn.Module, seed: int) -> Any:
        calls.append(seed)
        return [np.arange(1.0, g.size + 1) for g in coupling.groups]

    def batches() -> Any:
        passes.append(1)
        yield from DATA

    found = analysis.frontier(
        RATIOS, data=batches(), score=counted, seed=3, align=1, progress=False
    )
    assert (calls, passes) == ([3], [1])
    assert len(found) == 3
    assert found.settings["score"] == "counted"


def test_the_predicted_loss_is_the_share_of_the_score_that_goes(
    analysis: depcut.Analysis,
) -> None:
    def ones(coupling: Any, model: nn.Module, seed: int) -> Any:
        return [np.ones(g.size) for g in coupling.groups]

    for additive in (False, True):
        ones.additive = additive  # type: ignore[attr-defined]
        found = analysis.frontier(RATIOS, score=ones, align=1)
        for row in (found[0], found[1], found[2]):
            sizes = np.array([g.size for g in analysis.groups])
            kept = np.array(
                [len(row.plan.kept.get(g.name, range(g.size))) for g in analysis.groups]
            )
            gone = (sizes - kept).sum() / sizes.sum() if additive else (1 - kept / sizes).mean()
            assert row.loss == pytest.approx(gone)


def test_more_is_lost_at_a_higher_ratio(found: Frontier) -> None:
    assert [row.loss for row in found] == sorted(row.loss for row in found)
    assert 0 < found[0].loss < found[-1].loss < 1
    assert [row.macs for row in found] == sorted((row.macs for row in found), reverse=True)


def test_a_row_is_applied_and_repaired_on_the_data_of_the_frontier(found: Frontier) -> None:
    slim = found[1].apply(MODEL, progress=False)
    report = depcut.report(slim)
    assert report.compensation is not None
    again = found[1].plan.apply(MODEL, data=DATA, progress=False)
    for mine, other in zip(slim.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)
    plain = found[1].apply(MODEL, compensate=False)
    assert depcut.report(plain).compensation is None
    assert depcut.report(plain).digest == report.digest


def test_a_frontier_is_a_sequence_that_shows_itself(found: Frontier) -> None:
    assert len(found) == len([*found]) == 3
    assert found[-1] is found.entries[2]
    assert found[:2] == found.entries[:2]
    with pytest.raises(IndexError):
        found[3]
    lines = [line for line in str(found).splitlines() if line.startswith("│")]
    assert len(lines) == 3
    assert all(f"{row.loss:.4f}" in line for row, line in zip(found, lines, strict=True))
    assert "predicted loss" in str(found)
    assert repr(found) == "<Frontier of macs: 3 plans, ratios 0.2, 0.4, 0.6>"
    assert "predicted loss" in repr(found[0])
    assert json.loads(json.dumps(found.to_dict()))["rows"] == found.rows()
    assert len(found.summary().tables[0].rows) == 3


def test_ratios_out_of_reach_are_said(analysis: depcut.Analysis) -> None:
    found = analysis.frontier((0.5, 0.999), align=1)
    assert [row.ratio for row in found] == [0.5]
    assert "cannot be reduced" in found.unreached[0.999]
    assert "ratio 0.999: macs cannot" in " ".join(str(found).split())
    with pytest.raises(BudgetError, match=r"cannot be reduced by 0\.998"):
        analysis.frontier((0.999, 0.998), align=1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ratios": ()}, "ratios is"),
        ({"ratios": 0.5}, "ratios cannot be read"),
        ({"ratios": (0.5, 0.5)}, "ratios is"),
        ({"ratios": (0.5, 1.5)}, "the ratio is 1.5"),
        ({"ratios": (0.5, "half")}, "the ratio is 'half'"),
        ({"latency": 1}, "latency is 1"),
        ({"latency": True, "depth": True}, "not modelled"),
        ({"latency_ms": 3}, "takes no option 'latency_ms'"),
        ({"options": depcut.Options(latency_ms=3)}, "latency_ms"),
        ({"score": "obs"}, "needs data"),
    ],
)
def test_what_is_refused(analysis: depcut.Analysis, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        analysis.frontier(**given)


def test_ratios_by_glob_come_in_the_options(analysis: depcut.Analysis) -> None:
    options = depcut.Options(ratios={"0": 0.25}, align=1)
    found = analysis.frontier((0.3, 0.5), options=options)
    assert [len(row.plan.kept["0"]) for row in found] == [18, 18]


def test_dropped_branches_are_lost_as_a_whole() -> None:
    member = NETS["residual"]
    found = depcut.analyze(member.build(), member.inputs(2)).frontier(
        (0.3, 0.6), depth=True, align=1
    )
    for row in (found[0], found[1]):
        assert (row.macs, row.params) == (round(row.plan.macs), round(row.plan.params))
        assert 0 < row.loss < 1


def test_the_docstring_has_the_options_that_a_frontier_takes() -> None:
    text = depcut.Analysis.frontier.__doc__ or ""
    assert "align: Kept widths" in text
    assert "latency_ms:" not in text
    assert "**given" not in text


def test_a_plot_is_written(found: Frontier, tmp_path: Path) -> None:
    axes = found.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert axes.get_xlabel() == "MACs"
    assert {text.get_text() for text in axes.texts} == {"0.2", "0.4", "0.6"}
    assert found.plot(ax=axes) is axes
    with pytest.raises(InputError, match="writes no 'docx'"):
        found.plot(tmp_path / "frontier.docx")
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.png"]


def test_predicted_times_are_asked_for(
    analysis: depcut.Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Times:
        def predict(self, plan: depcut.Plan) -> float:
            return plan.macs * 1e-6

    monkeypatch.setattr(depcut.Analysis, "latency", lambda self, **_: Times())
    found = analysis.frontier(RATIOS, latency=True)
    assert [row.latency_ms for row in found] == [pytest.approx(1e-3 * r.macs) for r in found]
    assert "ms" in str(found)
    assert all(row.latency_ms is None for row in analysis.frontier(RATIOS))
