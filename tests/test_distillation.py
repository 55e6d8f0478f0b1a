"""Distillation: zero where nothing is removed, the formula elsewhere, gradients for the student."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS
from oracle import all_tensors, assert_untouched, by_row, call, sliced, snapshot
from torch import nn

import depcut
from depcut.errors import InputError, PlanError

NAMES = ["residual", "attention_gqa_expand", "lstm", "mlp"]


def students(name: str, *, whole: bool = False) -> tuple[nn.Module, nn.Module, Any, Any]:
    net = NETS[name]
    dense, x = net.build(), net.inputs(3)
    analysis = depcut.analyze(dense, x)
    keep = {} if whole else by_row(analysis, np.random.default_rng(1))
    plan = analysis.plan_keeping(keep)
    return dense, plan.apply(dense), plan, x


def positional(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(name: str) -> None:
    dense, slim, plan, x = students(name, whole=True)
    with depcut.training.Distillation(dense, slim, plan, hidden=("*",), dim=1) as distill:
        loss = distill(call(slim, x), *positional(x))
    assert 0 <= float(loss.detach()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_student_alone(name: str) -> None:
    dense, slim, plan, x = students(name)
    slim.train()
    dense.train()
    before = snapshot(dense)
    with depcut.training.Distillation(dense, slim, plan, hidden=("*",), dim=1) as distill:
        loss = distill(call(slim, x), *positional(x))
        loss.backward()
    assert float(loss.detach()) > 1e-6
    assert all(p.grad is None for p in dense.parameters())
    gradients = [p.grad for p in slim.parameters() if p.grad is not None]
    assert gradients
    assert any(g.abs().sum() > 0 for g in gradients)
    assert_untouched(dense, before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in slim.modules())


def test_the_loss_is_the_formula() -> None:
    dense, slim, plan, x = students("residual")
    with depcut.training.Distillation(
        dense, slim, plan, hidden=("stem", "conv1"), temperature=3.0, hidden_weight=0.7
    ) as distill:
        made = slim(x)
        loss = float(distill(made, x).detach())
    with torch.no_grad():
        p = (dense(x) / 3).softmax(1).double()
        q = (made / 3).softmax(1).double()
        expected = 9 * float((p * (p.log() - q.log())).sum(1).mean())
        hidden = []
        for layers in (lambda m, x: m.stem(x), lambda m, x: m.conv1(m.stem(x))):
            want, got = layers(dense, x), layers(slim, x)
            bias = "stem.0.bias" if not hidden else "conv1.0.bias"
            kept = plan.tensor_indices()[bias][0]
            want = sliced(want, (None, kept))
            hidden.append(float((got - want).square().mean() / want.square().mean()))
    assert loss == pytest.approx(expected + 0.7 * np.mean(hidden), rel=1e-4)


def test_learning_from_the_teacher_brings_the_student_closer() -> None:
    dense, slim, plan, x = students("mlp")
    optimizer = torch.optim.Adam(slim.parameters(), lr=0.01)
    losses = []
    with depcut.training.Distillation(dense, slim, plan, hidden=("*",), dim=1) as distill:
        for _ in range(60):
            loss = distill(slim(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_module_called_twice_is_compared_call_by_call() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.down = nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.mix(self.mix(self.up(x)).relu()))

    dense, x = Twice().eval(), torch.randn(5, 4)
    analysis = depcut.analyze(dense, x)
    plan = analysis.plan_keeping({analysis.groups[0].name: [0, 3, 7]})
    slim = plan.apply(dense)
    kept = torch.tensor([0, 3, 7])
    with depcut.training.Distillation(
        dense, slim, plan, hidden=("mix",), output_weight=0
    ) as distill:
        loss = float(distill(slim(x), x).detach())
    expected, d, s = [], dense.up(x), slim.up(x)
    for _ in range(2):
        d, s = dense.mix(d), slim.mix(s)
        expected.append(
            float(((s - d[:, kept]).square().mean() / d[:, kept].square().mean()).detach())
        )
        d, s = d.relu(), s.relu()
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_outputs_of_other_kinds() -> None:
    dense, slim, plan, x = students("residual")

    class Out:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    with depcut.training.Distillation(dense, slim, plan) as distill:
        y = slim(x)
        plain = float(distill(y, x).detach())
        assert float(distill({"logits": y}, x).detach()) == plain
        assert float(distill(Out(y), x).detach()) == plain
        with pytest.raises(InputError, match="no logits are found in a list"):
            distill([y], x)
        with pytest.raises(InputError, match="logits have shape"):
            distill(y[:1], x)


def test_hooks_go_and_come_back() -> None:
    dense, slim, plan, x = students("residual")
    distill = depcut.training.Distillation(dense, slim, plan, hidden=("stem",))
    hooks = lambda: sum(len(m._forward_hooks) for m in slim.modules())  # noqa: E731
    assert hooks() == 1
    with distill.paused():
        assert hooks() == 0
        slim(x)
    assert hooks() == 1
    distill.close()
    assert hooks() == 0
    with pytest.raises(InputError, match="student's layers ran 0 times"):
        distill(slim(x), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ("nowhere*",)}, "'nowhere\\*' matches no layer that both models have"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"output_weight": 0.0}, "nothing is compared"),
        ({"hidden_weight": float("nan")}, "hidden_weight is nan"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    dense, slim, plan, _ = students("residual")
    with pytest.raises(InputError, match=message):
        depcut.training.Distillation(dense, slim, plan, **options)


def test_a_plan_of_another_architecture() -> None:
    _, slim, plan, _ = students("residual")
    with pytest.raises(PlanError):
        depcut.training.Distillation(NETS["mlp"].build(), slim, plan)


def test_a_plan_from_a_file_will_do(tmp_path: Any) -> None:
    dense, slim, plan, x = students("residual")
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    losses = []
    for each in (plan, loaded):
        with depcut.training.Distillation(dense, slim, each, hidden=("*",)) as distill:
            losses.append(float(distill(slim(x), x).detach()))
    assert losses[0] == losses[1]
    assert len(all_tensors(slim)) == len(all_tensors(dense))
