"""Iterative pruning: exact budgets, one composed plan, and runs that survive a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from nets import NETS
from oracle import all_tensors, assert_close, assert_untouched, by_row, outputs, snapshot
from safetensors.torch import load_file
from selection import sampled
from torch import nn
from torch.nn import functional

import depcut
from depcut.errors import BudgetError, InputError, PlanError
from depcut.support.codec import decoded, encoded
from depcut.training.compose import composed
from depcut.training.iterative import geometric

ROOT = Path(__file__).parent.parent


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = X.reshape(64, 3, 4).sum(2).argmax(1)


def retrain(model: nn.Module, step: int, optimizer: Any = None) -> None:
    """Draws its batches from torch's own random state."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(5):
        rows = torch.randint(0, 64, (16,))
        optimizer.zero_grad()
        functional.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, all_tensors(b)[n]) for n, x in all_tensors(a).items())


# The schedule -------------------------------------------------------------------------------------


@given(st.floats(0.01, 0.99), st.integers(1, 20))
def test_every_step_removes_the_same_share_of_what_is_left(ratio: float, steps: int) -> None:
    targets = geometric(ratio, steps)
    assert len(targets) == steps
    assert targets[-1] == ratio
    left = [1.0, *(1 - t for t in targets)]
    shares = [1 - b / a for a, b in pairwise(left)]
    assert shares == pytest.approx([1 - (1 - ratio) ** (1 / steps)] * steps)


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
def test_budgets_are_of_the_dense_model(of: str) -> None:
    model = mlp()
    before = snapshot(model)
    cost = depcut.analyze(model, X[:2]).costs[of]
    result = depcut.training.iterate(
        model, 0.7, X[:2], steps=5, retrain=retrain, of=of, align=1, progress=False
    )
    assert_untouched(model, before)
    assert result.removed == pytest.approx(geometric(0.7, 5), abs=0.02)
    assert 1 - cost(result.plan.keep().counts) / cost.total == pytest.approx(result.removed[-1])
    assert len(result.steps) == 5
    options = {"align": 1, "progress": False} | ({"of": of} if of != "macs" else {})
    settings = {"ratio": 0.7, "of": of, "steps": 5, "options": options}
    assert result.plan.settings == settings


def test_coarse_steps_do_not_add_up() -> None:
    """Widths in multiples of 8 are off at every step, and the end is as close as one step comes."""
    model = mlp()
    result = depcut.training.iterate(model, 0.6, X[:2], steps=6, align=8, progress=False)
    once = depcut.training.iterate(model, 0.6, X[:2], steps=1, align=8, progress=False)
    assert result.removed[-1] == pytest.approx(once.removed[-1], abs=0.08)
    assert abs(result.removed[-1] - 0.6) < 0.08


def test_one_shot_is_shrink() -> None:
    model = mlp()
    result = depcut.training.iterate(model, 0.5, inputs=X[:2], progress=False)
    assert same(result.model, depcut.shrink(model, 0.5, X[:2]))


def test_units_are_ranked_anew_at_every_step() -> None:
    seen: list[list[int]] = []

    def widths(coupling: Any, model: nn.Module, _seed: int) -> list[Any]:
        seen.append([g.size for g in coupling.groups])
        return [np.arange(g.size, dtype=float) for g in coupling.groups]

    result = depcut.training.iterate(
        mlp(), 0.6, X[:2], steps=3, score=widths, align=1, progress=False
    )
    assert len(seen) == 3
    assert seen[0] == [64, 64]
    assert seen[0] > seen[1] > seen[2]
    # the best-ranked are the last ones, so the composed plan keeps the tail of the dense units
    for kept in result.plan.kept.values():
        assert kept.tolist() == list(range(64 - len(kept), 64))


def test_a_sequence_may_begin_with_training_alone() -> None:
    steps: list[int] = []
    result = depcut.training.iterate(
        mlp(),
        retrain=lambda _m, step: steps.append(step),
        inputs=X[:2],
        steps=[0, 0.3, 0.5],
        align=1,
        progress=False,
    )
    assert steps == [0, 1, 2]
    assert result.removed == pytest.approx([0, 0.3, 0.5], abs=0.02)


def test_data_is_read_once_and_bound_to_every_step() -> None:
    read = []

    def loader() -> Any:
        for start in (0, 16, 32):
            read.append(start)
            yield X[start : start + 16], Y[start : start + 16]

    result = depcut.training.iterate(
        mlp(),
        0.6,
        steps=3,
        retrain=retrain,
        score="taylor",
        data=loader(),
        loss=functional.cross_entropy,
        align=1,
        progress=False,
    )
    assert read == [0, 16, 32]
    assert result.removed == pytest.approx(geometric(0.6, 3), abs=0.02)
    assert all(report.compensation is not None for report in result.reports)


# Composition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled([*NETS]))
def test_two_plans_in_turn_are_one_plan(name: str) -> None:
    net = NETS[name]
    model = net.build()
    dense = depcut.analyze(model, net.inputs(2))
    slim, analysis, steps = model, dense, []
    for seed in (0, 1):
        plan = analysis.plan_keeping(by_row(analysis, np.random.default_rng(seed)))
        steps.append(plan.tensor_indices())
        slim = plan.apply(slim)
        analysis = depcut.analyze(slim, net.inputs(2))
    once = composed(dense, steps, {}).apply(model)
    found, wanted = all_tensors(once), all_tensors(slim)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    tolerance = max(1e-5, net.tolerance)
    assert_close(outputs(once, net.inputs(3)), outputs(slim, net.inputs(3)), tolerance, {})


@pytest.mark.parametrize("name", ["grouped", "attention_fused", "causal_decoder", "lstm"])
def test_steps_that_rank_units_row_by_row_are_one_plan(name: str) -> None:
    """Magnitudes choose other channels in every group of a convolution, other features by head."""
    net = NETS[name]
    model = net.build()
    result = depcut.training.iterate(
        model, 0.6, net.inputs(2), steps=3, score="magnitude", align=1, progress=False
    )
    once = result.plan.apply(model, compensate=False)
    wanted = all_tensors(result.model)
    assert {n: t.shape for n, t in all_tensors(once).items()} == {
        n: t.shape for n, t in wanted.items()
    }
    assert_close(outputs(once, net.inputs(3)), outputs(result.model, net.inputs(3)), 1e-5, name)
    assert sum(p.numel() for p in once.parameters()) < sum(p.numel() for p in model.parameters())


# Optimizers ---------------------------------------------------------------------------------------


def test_the_optimizer_goes_on_or_starts_anew() -> None:
    ages: dict[str, list[float]] = {"slice": [], "reset": []}

    def train(model: nn.Module, step: int, optimizer: torch.optim.Optimizer, how: str) -> None:
        retrain(model, step, optimizer)
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert held == {id(p) for p in model.parameters()}
        ages[how].append(float(optimizer.state[next(model.parameters())]["step"]))

    for how in ages:
        result = depcut.training.iterate(
            mlp(),
            0.5,
            X[:2],
            steps=3,
            retrain=lambda m, s, o, how=how: train(m, s, o, how),
            optimizer=adam,
            optimizer_state=how,
            progress=False,
        )
        assert isinstance(result.optimizer, torch.optim.AdamW)
    assert ages == {"slice": [5, 10, 15], "reset": [5, 5, 5]}


# Checkpoints --------------------------------------------------------------------------------------


def run(folder: Path, **options: Any) -> depcut.training.Iterated:
    model = mlp()
    torch.manual_seed(7)
    settings = {"optimizer": adam, "align": 1, "progress": False, "checkpoint": folder}
    return depcut.training.iterate(
        model, 0.7, steps=4, **{"retrain": retrain} | settings | options, inputs=X[:2]
    )


SEEN: list[int] = []
FAILS: set[int] = set()


def stumble(model: nn.Module, step: int, optimizer: Any) -> None:
    """The same function, whether it fails or not: another one would be another run."""
    SEEN.append(step)
    retrain(model, step, optimizer)
    if step in FAILS:
        raise FloatingPointError("loss is nan")


@pytest.fixture(autouse=True)
def firm() -> None:
    SEEN.clear()
    FAILS.clear()


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_a_run_that_failed_goes_on_to_the_same_end(tmp_path: Path, fails: int) -> None:
    whole = run(tmp_path / "whole")
    FAILS.add(fails)
    with pytest.raises(FloatingPointError, match=r"^loss is nan$"):
        run(tmp_path / "torn", retrain=stumble)
    assert len(list((tmp_path / "torn").iterdir())) == fails
    FAILS.clear()
    SEEN.clear()
    result = run(tmp_path / "torn", retrain=stumble)
    assert list(range(fails, 4)) == SEEN
    assert same(result.model, whole.model)
    assert result.plan.digest == whole.plan.digest
    assert result.removed == whole.removed
    assert [p.digest for p in result.steps] == [p.digest for p in whole.steps]
    assert result.model.training


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole = run(tmp_path, retrain=stumble)
    again = run(tmp_path, retrain=stumble)
    assert list(range(4)) == SEEN
    assert same(again.model, whole.model)
    shapes = [p.shape for p in again.plan.apply(mlp()).parameters()]
    assert shapes == [p.shape for p in again.model.parameters()]
    assert again.optimizer is not None
    assert float(again.optimizer.state[next(again.model.parameters())]["step"]) == 20


def test_checkpoints_are_json_and_safetensors(tmp_path: Path) -> None:
    result = run(tmp_path)
    names = {"plan.json", "state.json", "state.safetensors", "weights.safetensors"}
    for step in range(4):
        folder = tmp_path / f"step-{step:03d}"
        assert {f.name for f in folder.iterdir()} == names
        json.loads((folder / "state.json").read_text())
        depcut.Plan.load(folder / "plan.json")
    weights = load_file(tmp_path / "step-003" / "weights.safetensors")
    assert all(torch.equal(weights[n], t) for n, t in result.model.state_dict().items())


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import time
import torch
import test_iterate

torch.set_num_threads(1)

def retrain(model, step, optimizer):
    test_iterate.retrain(model, step, optimizer)
    with open({log!r}, "a") as log:
        log.write(f"{{step}}\\n")
    if step == int(sys.argv[1]):
        time.sleep(60)

result = test_iterate.run(Path({folder!r}), retrain=retrain)
print(result.plan.digest)
"""


def script(tmp_path: Path, stop: int) -> subprocess.Popen[str]:
    code = SCRIPT.format(
        tests=str(ROOT / "tests"),
        folder=str(tmp_path / "run"),
        log=str(tmp_path / "log"),
    )
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(stop)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.sweep
def test_a_run_survives_kill_9(tmp_path: Path) -> None:
    with script(tmp_path, stop=2) as process:
        deadline = time.monotonic() + 120
        log = tmp_path / "log"
        while not (log.exists() and "2" in log.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    # what a process that dies while it writes leaves behind
    half = tmp_path / "run" / ".draft-abc"
    half.mkdir()
    (half / "plan.json").write_text("{")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        half.name,
        "step-000",
        "step-001",
    ]
    with script(tmp_path, stop=-1) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert log.read_text().split() == ["0", "1", "2", "2", "3"]
    assert not half.exists()
    # undisturbed, in a process like the others
    (tmp_path / "whole").mkdir()
    with script(tmp_path / "whole", stop=-1) as process:
        digest, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == digest
    for file in ("weights.safetensors", "state.safetensors"):
        torn = load_file(tmp_path / "run" / "step-003" / file)
        whole = load_file(tmp_path / "whole" / "run" / "step-003" / file)
        assert list(torn) == list(whole)
        assert all(torch.equal(torn[n], t) for n, t in whole.items())


def test_an_optimizer_state_goes_through_json() -> None:
    model = mlp()
    optimizer = adam(model)
    retrain(model, 0, optimizer)
    plain, tensors = encoded(optimizer.state_dict())
    other = adam(model)
    other.load_state_dict(decoded(json.loads(json.dumps(plain)), tensors))
    assert str(other.state_dict()) == str(optimizer.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"of": "params"}, "of was 'macs', is 'params'"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"optimizer_state": "reset"}, "optimizer_state was 'slice'"),
    ],
)
def test_checkpoints_of_another_request_are_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match=rf"{words}(.|\n)*another folder"):
        run(tmp_path, **change)


def test_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match=r"steps of an earlier run(.|\n)*resume=True"):
        run(tmp_path, resume=False)
    (tmp_path / "step-001" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot be read(.|\n)*remove the folder"):
        run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the folder cannot be made"):
        run(tmp_path / "file")


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_steps_out_of_range(steps: Any) -> None:
    with pytest.raises(InputError, match=r"steps is .*(.|\n)*at least 1"):
        depcut.training.iterate(mlp(), 0.5, X[:2], steps=steps)


@pytest.mark.parametrize("sequence", [[0.5, 0.5], [0.5, 0.2], [], [0]])
def test_a_sequence_that_does_not_increase(sequence: list[float]) -> None:
    with pytest.raises(InputError, match=r"do not increase(.|\n)*rising"):
        depcut.training.iterate(mlp(), steps=sequence, inputs=X[:2])


@pytest.mark.parametrize("sequence", [[0.1, 1.0], [0.2, "x"], [-0.1, 0.5], [0.2, 0]])
def test_a_sequence_out_of_range(sequence: list[Any]) -> None:
    with pytest.raises(InputError, match=r"between 0 and 1(.|\n)*steps=, item"):
        depcut.training.iterate(mlp(), steps=sequence, inputs=X[:2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "the ratio is 1.0"),
        ({"ratio": None}, "the ratio is None"),
        ({"ratio": 0.5, "steps": [0.5]}, "stands for the ratio"),
        ({"of": "latency"}, "no 'latency' to measure"),
        ({"retrain": 3}, "retrain is a int, not a function"),
        ({"optimizer": adam(mlp())}, "optimizer is a AdamW, not a function"),
        ({"optimizer_state": "keep"}, "optimizer_state is 'keep'"),
        ({"score": "wanda"}, "needs data"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(InputError, match=words) as caught:
        depcut.training.iterate(
            model, **({"ratio": 0.5, "inputs": X[:2], "progress": False} | options)
        )
    assert caught.value.remedy
    assert_untouched(model, before)


def test_a_ratio_that_no_step_can_reach() -> None:
    with pytest.raises(BudgetError, match="cannot be reduced"):
        depcut.training.iterate(mlp(), 0.9999, X[:2], steps=2, progress=False)


def test_a_retrain_function_that_changes_the_architecture() -> None:
    def widen(model: nn.Module, _step: int) -> nn.Module:
        model[0] = nn.Linear(12, 99)
        return model

    words = r"changed the architecture: 0.weight was \(32, 12\), is \(99, 12\)(.|\n)*step 0"
    with pytest.raises(PlanError, match=words):
        depcut.training.iterate(
            mlp(), 0.5, X[:2], steps=1, retrain=widen, of="channels", progress=False
        )
    with pytest.raises(InputError, match=r"returned a float(.|\n)*return None"):
        depcut.training.iterate(
            mlp(), 0.5, X[:2], steps=1, retrain=lambda _m, _s: 0.1, progress=False
        )


def test_a_retrained_copy_may_be_returned() -> None:
    def copied(model: nn.Module, _step: int) -> nn.Module:
        fresh = nn.Sequential(
            *[
                nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m
                for m in model
            ]
        )
        made.append(fresh)
        return fresh

    made: list[nn.Module] = []
    result = depcut.training.iterate(mlp(), 0.5, X[:2], steps=2, retrain=copied, progress=False)
    assert result.model is made[-1]


def test_what_the_retrain_function_raises_is_not_touched() -> None:
    error = FloatingPointError("loss is nan at step 3")

    def diverge(_model: nn.Module, _step: int) -> None:
        raise error

    with pytest.raises(FloatingPointError) as caught:
        depcut.training.iterate(mlp(), 0.5, X[:2], steps=2, retrain=diverge, progress=False)
    assert caught.value is error
    assert caught.value.__cause__ is None


def test_weights_that_retraining_made_nan_are_named() -> None:
    def spoil(model: nn.Module, _step: int) -> None:
        with torch.no_grad():
            model[2].weight.fill_(float("nan"))

    with pytest.raises(InputError, match=r"not finite(.|\n)*2\.weight"):
        depcut.training.iterate(mlp(), 0.5, X[:2], steps=2, retrain=spoil, progress=False)


# One budget for everything ------------------------------------------------------------------------


@given(st.integers(2, 500), st.floats(0.05, 0.95), st.integers(1, 12), st.floats(0.05, 0.95))
def test_a_budget_is_spent_to_the_last_epoch(
    epochs: int, ratio: float, cycles: int, dense: float
) -> None:
    each = round(epochs * (1 - dense)) // cycles
    assume(0 < each * cycles < epochs)
    first, *rest = depcut.training.budget_phases(epochs, ratio, cycles, dense=dense)
    assert first.epochs + sum(p.epochs for p in rest) == epochs
    assert (first.kind, first.ratio, first.schedule) == ("dense", 0.0, "llr")
    assert len({p.epochs for p in rest}) == 1
    assert abs(first.epochs - dense * epochs) <= cycles
    assert [p.ratio for p in rest] == list(geometric(ratio, cycles))


def test_phases_are_carried_out(tmp_path: Path) -> None:
    seen: list[tuple[depcut.training.Phase, int]] = []

    def train(model: nn.Module, phase: depcut.training.Phase, optimizer: Any) -> None:
        retrain(model, 0, optimizer)
        seen.append((phase, sum(p.numel() for p in model.parameters())))

    model = mlp()
    phases = depcut.training.budget_phases(20, 0.6, 3, dense=0.4, schedule="linear")
    result = depcut.training.run_phases(
        model, phases, X[:2], train=train, optimizer=adam, checkpoint=tmp_path, progress=False
    )
    assert [p for p, _ in seen] == list(phases)
    assert seen[0][1] == sum(p.numel() for p in model.parameters())
    assert [n for _, n in seen] == sorted({n for _, n in seen}, reverse=True)
    assert result.removed[-1] == pytest.approx(0.6, abs=0.05)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 1.2, 2), "the ratio is 1.2"),
        ((0, 0.5, 2), "epochs is 0"),
        ((10, 0.5, 0), "cycles is 0"),
        ((3, 0.5, 9), "3 epochs are too few for a dense phase and 9 cycles"),
    ],
)
def test_budgets_that_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        depcut.training.budget_phases(*arguments)
