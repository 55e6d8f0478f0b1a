"""A small part of the study, on a net of seconds; and that its recipes are their formulas."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


MODULES = (
    "study study_prune study_sparse study_papers study_report study_tables study_claims "
    "study_verdicts study_zeros study_equal accuracy_nets"
).split()


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The study's modules by name; nets and rows are kept in an empty folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known = set(sys.modules)
    modules = {name: import_module(name) for name in MODULES}
    monkeypatch.setattr(modules["study_report"], "PATH", tmp_path / "study.jsonl.gz")
    yield SimpleNamespace(**{n.removeprefix("study_"): m for n, m in modules.items()})
    for name in set(sys.modules) - known:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def subject(study: Any) -> Any:
    """The perceptron on the table, trained for a few steps."""
    task = study.study.STUDY["mlp_table"]
    task = replace(task, recipe=replace(task.recipe, steps=12))
    return study.study.Trained(task, 0)


def jobs(study: Any, subject: Any, part: str, *methods: str) -> list[Any]:
    found = [job for job in study.study.PARTS[part](subject) if job.method in methods]
    assert {job.method for job in found} == set(methods)
    return found


AS_MANY = ("magnitude", "SparseGPT, shares of obs")


def rows_of(study: Any, subject: Any, part: str, *methods: str) -> list[Any]:
    return [
        {**study.study.identity(subject, job), **row}
        for job in jobs(study, subject, part, *methods)
        for row in study.study.ran(job)
    ]


def test_masks_judge_what_a_smaller_model_does(study: Any, subject: Any) -> None:
    rows = rows_of(study, subject, "criteria", "magnitude", "obs")
    plain = [row for row in rows if row.get("compensated") is False]
    assert len(plain) == 2 * len(study.prune.REMOVED)
    assert all(row["masked"] for row in plain)
    for row in plain:
        data = subject.calibration if row["method"] == "obs" else None
        plan = subject.analysis.plan(row["removed"], score=row["method"], data=data, align=1)
        slim = plan.apply(subject.model, compensate=False)
        made = {**subject.judged(slim), **subject.sized(slim)}
        assert {name: row[name] for name in made} == pytest.approx(made, abs=1e-4)


def test_every_way_to_train_has_its_steps(study: Any, subject: Any) -> None:
    names = (
        "rate rewound", "early ticket", "scratch-B", "distilled", "dense, rate rewound",
        "budgeted: T/2 dense, T/2 pruned", "pruned while trained, T in all",
    )  # fmt: skip
    rows = rows_of(study, subject, "tickets", *names)
    assert not [row for row in rows if "error" in row]
    steps = {(row["method"], row["removed"]): row["steps"] for row in rows}
    assert {steps["rate rewound", r] for r in (0.5, 0.8, 0.9)} == {12}
    assert {steps["early ticket", r] for r in (0.5, 0.8, 0.9)} == {11}
    assert steps["scratch-B", 0.5] <= steps["scratch-B", 0.9] == 24
    assert {row["steps"] for row in rows if "T in all" in row["method"]} == {12}
    shares = [row["macs"] + row["removed"] for row in rows if "scratch" not in row["method"]]
    assert shares == pytest.approx([1.0] * len(shares), abs=0.05)
    (control,) = [row for row in rows if row["method"] == "dense, rate rewound"]
    assert (control["removed"], control["steps"], control["macs"]) == (0.0, 12, 1.0)


def test_equal_numbers_of_parameters(study: Any, subject: Any) -> None:
    rows = rows_of(
        study, subject, "sparse_dense", "large-sparse, gradual", "gradual, structured",
        "small-dense",
    )  # fmt: skip
    found = {(row["method"], row["removed"]): row["params"] for row in rows}
    assert len(found) == 9
    assert all(abs(params - (1 - removed)) < 0.03 for (_, removed), params in found.items())


def test_tickets_of_zeros_keep_the_trained_nets_zeros(study: Any, subject: Any) -> None:
    rows = rows_of(study, subject, "sparse_tickets", "ticket of step 0", "new weights")
    assert [row["steps"] for row in rows] == [12] * 6
    # Biases that begin at zero behind units without weights stay there.
    assert all(-0.03 < row["params"] - (1 - row["removed"]) <= 1e-4 for row in rows)
    of_zeros = study.zeros._masks(study.zeros._sparse_ticket(subject, 0.8))
    other = study.zeros._masks(study.zeros._sparse_scratch(subject, 0.8))
    assert all(torch.equal(mask, other[name]) for name, mask in of_zeros.items())
    trained = copy.deepcopy(subject.model)
    study.sparse.by_magnitude(trained, subject, study.zeros._share(subject, 0.8))
    kept = study.zeros._masks(trained)
    assert all(torch.equal(mask, kept[name]) for name, mask in of_zeros.items())


def test_jobs_that_are_done_are_not_run_again(
    study: Any, subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs(study, subject, "unstructured", "magnitude")[0]
    results = study.study.Results()
    facts = study.study.identity(subject, job)
    assert not results.has(facts)
    results.add([{**facts, **row} for row in study.study.ran(job)])
    assert study.study.Results().has(facts)
    before = study.report.rows()
    assert [row["removed"] for row in before] == list(study.sparse.SPARSITIES)
    study.report.append([{**before[0], "lost": 77.0}])  # measured again
    study.report.repack()
    assert [row["lost"] for row in study.report.rows()].count(77.0) == 1
    assert len(study.report.rows()) == len(before)


def test_a_failing_job_is_a_row(study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> Iterator[Any]:
        yield {"removed": 0.5, "lost": 1.0}
        raise ValueError("no such thing")

    rows = study.study.ran(study.study.Job("part", "method", fails))
    assert rows[0]["lost"] == 1.0
    assert rows[1]["error"] == "ValueError: no such thing"
    assert "no such thing" in capsys.readouterr().err


def test_tables_and_claims_come_from_the_rows(study: Any, subject: Any) -> None:
    rows = rows_of(study, subject, "criteria", "magnitude", "random", "obs")
    rows += rows_of(study, subject, "unstructured", *study.sparse.METHODS)
    rows += rows_of(
        study, subject, "unstructured", *(f"{name}, as many as obs" for name in AS_MANY)
    )
    assert not [row for row in rows if row.get("error") and "matrices hold" not in row["error"]]
    good = [row for row in rows if "error" not in row]
    tables = study.tables.tables(good)
    marks = [m[2] for p in study.report.PAGES for m in study.report.MARKS.finditer(p.read_text())]
    assert sorted(marks) == sorted(tables)
    page = study.report.filled(study.report.PAGES[0].read_text(), tables)
    assert tables["criteria"] in page
    assert study.report.filled(page, tables) == page
    obs = next(line for line in tables["criteria"].splitlines() if line.startswith("| obs |"))
    lost = [
        row["lost"] / study.verdicts.ranges_of(good)["mlp_table"]
        for row in good
        if (row["method"], row.get("compensated"), row["removed"]) == ("obs", True, 0.8)
    ]
    assert obs.split(" | ")[4] == f"{100 * lost[0]:.1f}"
    assert "tickets" in tables["claims"]
    assert "not measured yet" in tables["claims"]
    assert any(word in tables["claims"] for word in ("| confirmed |", "too few", "not confirmed"))


def test_rows_of_an_older_dense_net_do_not_count(study: Any) -> None:
    row = {"task": "t", "seed": 0, "part": "criteria", "method": "obs", "key": "old", "lost": 1.0}
    study.report.append([{**row, "removed": 0.2}, {**row, "removed": 0.5}])
    study.report.append([{**row, "key": "new", "removed": 0.5, "lost": 2.0}, {**row, "seed": 1}])
    found = {(r["seed"], r["key"], r.get("removed")) for r in study.report.rows()}
    assert found == {(0, "new", 0.5), (1, "old", None)}


def test_norms_are_estimated_anew_behind_zeros(study: Any, subject: Any) -> None:
    sparse = copy.deepcopy(subject.model)
    study.sparse.renormed(study.sparse.by_magnitude, sparse, subject, 0.5)
    norm, wanted = sparse.norm1, []
    for inputs, _ in subject.pairs:
        wanted.append(sparse.layer1(inputs).mean(0))
    torch.testing.assert_close(norm.running_mean, torch.stack(wanted).mean(0))
    assert norm.momentum == subject.model.norm1.momentum
    assert not sparse.training
    assert not any(m.training for m in sparse.modules())


@pytest.mark.parametrize(
    ("gain", "verdict"), [(1.0, "confirmed"), (-1.0, "**not confirmed**, the reverse")]
)
def test_a_claim_is_judged_in_pairs(study: Any, gain: float, verdict: str) -> None:
    def row(method: str, lost: float, seed: int, compensated: bool | None = None) -> Any:
        part = "criteria" if compensated is not None else "unstructured"
        base = {"task": "tu"[seed % 2], "part": part, "method": method, "removed": 0.8}
        return {**base, "seed": seed, "lost": lost, "compensated": compensated}

    rows = [row("random", 10.0, seed, compensated=False) for seed in range(6)]
    for seed in range(6):
        rows += [row("Wanda", 5.0 - gain, seed), row("magnitude by layer", 5.0, seed)]
    claims = study.verdicts
    claim = next(c for c in study.claims.CLAIMS if "(Wanda) beat weights, as" in c.text)
    found, figures = claims.judged(claim, rows, claims.ranges_of(rows))
    assert found == verdict
    assert f"{gain / 10:+.1%}" in figures
    few = [row for row in rows if row["seed"] < 5]
    assert claims.judged(claim, few, claims.ranges_of(few))[0] == "too few yet"
    alike = [{**row, "task": "t"} for row in rows]
    assert claims.judged(claim, alike, claims.ranges_of(alike))[0] == "too few yet"


def test_pairs_of_which_one_works_and_controls_of_which_nothing_goes(study: Any) -> None:
    def row(method: str, removed: float, lost: float, seed: int) -> Any:
        base = {"task": "t", "part": "tickets", "method": method, "removed": removed}
        return {**base, "seed": seed, "lost": lost}

    rows = [
        {**row("random", 0.8, 10.0, 0), "part": "criteria", "compensated": False},
        *(row("rate rewound", 0.5, -2.0, seed) for seed in range(6)),
        *(row("rate rewound", 0.9, 9.0, seed) for seed in range(6)),
        *(row("dense, rate rewound", 0.0, -1.0, seed) for seed in range(6)),
        *(row("early ticket", removed, 9.5, seed) for seed in range(6) for removed in (0.5, 0.9)),
    ]
    ranges = study.verdicts.ranges_of(rows)
    by = {claim.text: claim for claim in study.claims.CLAIMS}
    moderate = next(claim for text, claim in by.items() if text.startswith("a moderately"))
    figures = study.verdicts.judged(moderate, rows, ranges)[1]
    assert figures.startswith("better in 100% of 6 pairs")
    rewinding = by["rewinding the learning rate matches or beats rewinding weights"]
    figures = study.verdicts.judged(rewinding, rows, ranges)[1]
    assert figures.endswith("holds in 100% of the 6 pairs of which one still works")
    times = [
        {"task": "t", "part": part, "removed": 0.8, "speedup": speedup}
        for part, speedup in (("times", 2.0), ("sparse_times", 1.0))
    ]
    assert [how for _, _, how, _ in study.verdicts.timed(times)] == ["confirmed"] * 2
    slower = [{**row, "speedup": 3.0 - row["speedup"]} for row in times]
    assert {how for _, _, how, _ in study.verdicts.timed(slower)} == {"not confirmed, mixed"}


def test_a_curve_is_followed_to_where_it_loses_what_is_allowed(study: Any) -> None:
    point = study.equal.Point
    curve = [study.equal.DENSE, point(0.0, 0.8, 0.7, 1.2), point(4.0, 0.4, 0.3, 2.0)]
    assert study.equal.where(curve, 1.0) == pytest.approx((1.0, 0.7, 0.6, 1.4))
    assert study.equal.where([*curve, point(0.5, 0.1, 0.1, 9.0)], 1.0) == pytest.approx(
        (1.0, 0.7, 0.6, 1.4)
    )  # it is not entered again
    assert study.equal.where(curve, 5.0) == curve[-1]
    assert study.equal.where([study.equal.DENSE, point(2.0, 0.5, 0.5, 1.0)], 1.0).params == 0.75


def test_wanda_heeds_the_norms_of_inputs(study: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32) * torch.logspace(-1, 1, 32)
    dense, lost = nn.Sequential(nn.Linear(32, 8, bias=False)), []
    for sparsify in (study.sparse.by_wanda, study.sparse.by_magnitude_of_layer):
        sparse = copy.deepcopy(dense)
        sparsify(sparse, SimpleNamespace(pairs=[(x, None)]), 0.5)
        assert int((sparse[0].weight == 0).sum()) == 128
        lost.append(float((sparse(x) - dense(x)).detach().square().sum()))
    assert lost[0] < lost[1] / 4


def test_what_a_convolution_multiplies_is_its_output(study: Any) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 8, 8)
    made = study.sparse._vectors(conv, x) @ conv.weight.flatten(1).T
    torch.testing.assert_close(made, conv(x).flatten(2).transpose(1, 2).flatten(0, 1))


def test_sparsegpt_without_correlations_is_magnitude(study: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    solved = study.sparse._solved(weight, torch.eye(32).double(), 0.5, four=False)
    limit = weight.abs().flatten().kthvalue(96).values
    torch.testing.assert_close(solved, weight * (weight.abs() > limit))


def test_sparsegpt_makes_up_for_what_goes(study: Any) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 48), torch.randn(400, 6) @ torch.randn(6, 48)
    x += 0.1 * torch.randn(400, 48)
    solved = study.sparse._solved(weight, (x.T @ x).double(), 0.5, four=False)
    limit = weight.abs().flatten().kthvalue(192).values
    plain = weight * (weight.abs() > limit)
    lost = [float((x @ (w - weight).T).square().sum()) for w in (solved, plain)]
    assert lost[0] < lost[1] / 4
    assert float((solved == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_layers_keep_the_shares_of_a_smaller_model(study: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    slim = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))
    sparse = copy.deepcopy(dense)
    subject = SimpleNamespace(pairs=[(torch.randn(256, 32), None)])
    study.sparse.of_layers(slim)(sparse, subject, 0.75)
    left = [int(sparse[i].weight.count_nonzero()) for i in (0, 2)]
    assert left == pytest.approx([512, 512], abs=8)


def test_two_of_four(study: Any) -> None:
    torch.manual_seed(0)
    solved = study.sparse._solved(torch.randn(5, 32), torch.eye(32).double(), 0.5, four=True)
    assert (solved.view(5, 8, 4) != 0).sum(2).eq(2).all()


def test_flap_and_wanda_sp_come_to_the_macs(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = study.study.STUDY["gpt_digits"]
    build = study.study.STUDY["gpt_digits"].build
    assert isinstance(build(), nn.Module)
    monkeypatch.setattr(study.prune, "BATCHES", 1)
    task = replace(
        task,
        recipe=replace(task.recipe, steps=2),
        build=lambda: study.accuracy_nets.CharGPT(18, 64, width=16, heads=4, depth=2),
    )
    subject = study.study.Trained(task, 0)
    rows = rows_of(study, subject, "papers", "ShortGPT", "Wanda-sp", "FLAP", study.papers.EQUAL)
    by = {row["removed"]: row["macs"] for row in rows if row["method"] == "FLAP" and "macs" in row}
    assert by
    head = study.papers._units(subject).head_macs / subject.macs  # what may go beyond
    assert all(-1e-4 < 1 - removed - macs < head for removed, macs in by.items())
    shallow = [row for row in rows if row["method"] == "ShortGPT"]
    assert [round(row["macs"] + row["removed"], 2) for row in shallow] == [1.0]
