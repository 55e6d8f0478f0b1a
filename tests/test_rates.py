"""How far outputs are from the dense ones, and the peak rate that retraining takes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.errors import InputError

pytest.importorskip("accelerate")


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def retrain(model: nn.Module, **options: Any) -> depcut.training.Retrained:
    given = {"epochs": 1, "loss": functional.cross_entropy, "lr": 0.1, "progress": False}
    return depcut.training.retrain(model, batches(), **{**given, **options})


def pruned(dense: nn.Module, **options: Any) -> tuple[depcut.Plan, nn.Module]:
    plan = depcut.analyze(dense, batches()[0][0]).plan(0.5, align=1)
    return plan, plan.apply(dense, **options)


@pytest.mark.parametrize("read", [1, 2, 3])
def test_the_distance_of_outputs_is_its_formula(read: int) -> None:
    dense, slim = mlp(), mlp(1)
    missed = spread = 0.0
    with torch.no_grad():
        for x, _ in batches()[:read]:
            wanted, got = dense(x).double(), slim(x).double()
            missed += float(((wanted - got) ** 2).sum())
            spread += float(((wanted - wanted.mean(0)) ** 2).sum())
    found = depcut.training.output_distance(dense, slim, batches(), read)
    assert found == pytest.approx((missed / spread) ** 0.5, rel=1e-12)


def test_equal_models_have_no_distance_and_stay_as_they_are() -> None:
    dense = mlp().train()
    slim = mlp().train()
    before = snapshot(dense), snapshot(slim)
    assert depcut.training.output_distance(dense, slim, [x for x, _ in batches()]) == 0
    assert dense.training and dense[1].training and slim.training  # noqa: PT018
    assert_untouched(dense, before[0])
    assert_untouched(slim, before[1])


class Cached(nn.Module):
    """Returns, beside its logits, a tensor as wide as its hidden layer, and token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.first(x))
        logits = self.second(hidden)
        return {"logits": logits, "argmax": logits.argmax(1), "cache": hidden}


def test_outputs_of_other_shapes_and_types_do_not_count() -> None:
    torch.manual_seed(0)
    dense, slim = Cached().eval(), Cached().eval()
    slim.first, slim.second = nn.Linear(6, 4), nn.Linear(4, 3)
    only = [nn.Sequential(m.first, nn.ReLU(), m.second) for m in (dense, slim)]
    found = depcut.training.output_distance(dense, slim, batches())
    assert found == pytest.approx(
        depcut.training.output_distance(only[0], only[1], batches()), rel=1e-12
    )


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_constant_outputs_have_no_spread_to_compare_with(value: float, expected: float) -> None:
    dense, slim = nn.Linear(6, 3), nn.Linear(6, 3)
    for model, bias in ((dense, 0.0), (slim, value)):
        nn.init.zeros_(model.weight)
        nn.init.constant_(model.bias, bias)
    assert depcut.training.output_distance(dense, slim, batches()) == expected


def test_no_data_is_an_error() -> None:
    with pytest.raises(InputError, match=r"the loader is empty\n  where: data="):
        depcut.training.output_distance(mlp(), mlp(), [])


def test_auto_takes_the_smaller_distance() -> None:
    dense = mlp()
    plan, ruined = pruned(dense)
    for layer in (ruined[0], ruined[3]):
        with torch.no_grad():
            layer.weight.mul_(-3)
    weights = depcut.training.relative_distance(dense, plan)
    outputs = depcut.training.output_distance(dense, ruined, batches())
    assert outputs > weights
    assert retrain(ruined, plan=plan).settings["distance"] == weights
    mended = plan.apply(dense, data=batches())
    outputs = depcut.training.output_distance(dense, mended, batches())
    made = retrain(mended, plan=plan)
    assert made.settings["distance"] == pytest.approx(outputs)
    assert outputs < weights
    assert made.settings["output_distance"] == made.settings["distance"]
    assert made.settings["schedule"] == "allr"
    by_name = retrain(mended, plan=plan, schedule="allr").settings
    assert by_name["distance"] == weights
    assert "output_distance" not in by_name


def test_auto_needs_no_plan_but_the_dense_model() -> None:
    dense = mlp()
    _, slim = pruned(dense)
    before = snapshot(dense)
    made = retrain(slim, dense=dense)
    assert made.settings["schedule"] == "allr"
    assert made.settings["distance"] == pytest.approx(
        depcut.training.output_distance(dense, slim, batches())
    )
    assert_untouched(dense, before)
    assert retrain(slim).settings["schedule"] == "llr"
    assert retrain(slim).settings["distance"] is None


def test_outputs_that_are_not_finite_have_no_distance() -> None:
    dense = mlp()
    _, slim = pruned(dense)
    with torch.no_grad():
        dense[3].bias[0] = float("nan")
    settings = retrain(slim, dense=dense).settings
    assert settings["schedule"] == "llr"
    assert settings["output_distance"] is None


def test_a_run_goes_on_with_the_distance_that_it_began_with(tmp_path: Path) -> None:
    dense = mlp()
    _, slim = pruned(dense)
    first = retrain(slim, dense=dense, epochs=2, checkpoint=tmp_path)
    with torch.no_grad():
        dense[3].bias.add_(torch.tensor([1.0, 2.0, 3.0]))  # as another machine's rounding would
    again = retrain(slim, dense=dense, epochs=2, checkpoint=tmp_path)
    assert again.resumed == 6
    assert again.settings == first.settings
    anew = retrain(slim, dense=dense, epochs=2, checkpoint=tmp_path, resume=False)
    assert anew.resumed == 0
    assert anew.settings["distance"] > first.settings["distance"]


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ("model.pt", r"dense is a str, not a torch\.nn\.Module"),
        (nn.Linear(5, 3), r"the model fails on the training data: RuntimeError: .*\n.*dense="),
        (nn.Linear(6, 4), r"outputs have the shapes \(8, 4\), the smaller one's \(8, 3\)"),
    ],
    ids=["no module", "other inputs", "other outputs"],
)
def test_another_dense_model_is_refused(dense: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        retrain(mlp(), dense=dense)
