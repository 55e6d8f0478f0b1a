"""Bad input: an error that says what, where and what to do, and a model that nobody touched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nets import NETS, normal
from oracle import assert_untouched, snapshot
from torch import Tensor, nn

import depcut
from depcut.errors import BudgetError, CaptureError, DepcutError, InputError, PlanError


@contextmanager
def assert_refused(
    model: nn.Module, *keywords: str, kind: type[DepcutError] = DepcutError
) -> Iterator[None]:
    """The block raises an error whose text has every keyword, and leaves the model alone.

    A keyword may list alternatives: "smallest|at least".
    """
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value).lower()
    for keyword in keywords:
        assert any(word.lower() in message for word in keyword.split("|")), (
            f"{keyword!r} is not in: {message}"
        )
    assert caught.value.remedy, f"no remedy in: {message}"
    assert_untouched(model, before)


def residual() -> nn.Module:
    return NETS["residual"].build()


IMAGES = NETS["residual"].inputs(2)


# Ratios and budgets -------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 50, math.nan, math.inf, -math.inf])
def test_a_ratio_outside_of_its_range(ratio: float) -> None:
    model = residual()
    with assert_refused(model, "ratio", str(ratio), "between 0 and 1|(0, 1)|0 < ratio < 1"):
        depcut.shrink(model, ratio, IMAGES)


@pytest.mark.parametrize("ratio", ["0.5", None, [0.5], True])
def test_a_ratio_that_is_no_number(ratio: Any) -> None:
    model = residual()
    with assert_refused(model, "ratio", kind=InputError):
        depcut.shrink(model, ratio, IMAGES)


@pytest.mark.parametrize("of", ["macs", "params"])
def test_a_budget_below_the_floors_says_the_smallest_reachable(of: str) -> None:
    model = residual()
    with assert_refused(model, of, "0.999|99.9", "smallest|at most|largest", kind=BudgetError):
        depcut.shrink(model, 0.999, IMAGES, of=of, align=1)


def test_a_budget_that_kept_layers_put_out_of_reach() -> None:
    model = residual()
    with assert_refused(model, "smallest|at most|largest", kind=BudgetError):
        depcut.shrink(model, 0.9, IMAGES, ignore=["conv1*", "head*"], align=1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("of", "flop"),
        ("score", "magnitud"),
        ("allocation", "globl"),
        ("align", 0),
        ("align", -8),
    ],
)
def test_an_unknown_option_is_named_with_what_there_is(option: str, value: Any) -> None:
    model = residual()
    with assert_refused(model, option, str(value), kind=InputError):
        depcut.shrink(model, 0.5, IMAGES, **{option: value})


@pytest.mark.parametrize("ratios", [{"stem*": 1.5}, {"stem*": math.nan}, {"no_such_layer*": 0.5}])
def test_ratios_of_layers_are_checked_one_by_one(ratios: dict[str, float]) -> None:
    model = residual()
    with assert_refused(model, next(iter(ratios)), kind=InputError):
        depcut.shrink(model, 0.5, IMAGES, of="channels", ratios=ratios)


class OnlyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


class NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_nothing_prunable_lists_the_reasons() -> None:
    model = OnlyOutputs()
    with assert_refused(
        model, "nothing|no group", "classifier", "input", "output", kind=BudgetError
    ):
        depcut.shrink(model, 0.5, normal(2, 6))


def test_a_model_without_parameters() -> None:
    model = NoParameters()
    with assert_refused(model, "nothing|no group|no parameter", kind=BudgetError):
        depcut.shrink(model, 0.5, normal(2, 6))


def test_everything_kept_by_name() -> None:
    model = residual()
    with assert_refused(model, "ignore", kind=BudgetError):
        depcut.shrink(model, 0.5, IMAGES, ignore=["*"])


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stemm", "stem.0.weigth", "layer9.*"])
def test_an_unknown_name_in_keep(name: str) -> None:
    model = residual()
    with assert_refused(model, "ignore", name, kind=InputError):
        depcut.shrink(model, 0.5, IMAGES, ignore=["stem.0", name])


def test_a_close_name_is_suggested() -> None:
    model = residual()
    with assert_refused(model, "stemm", "stem", kind=InputError):
        depcut.shrink(model, 0.5, IMAGES, ignore=["stemm"])


def test_explaining_an_unknown_layer() -> None:
    model = residual()
    analysis = depcut.analyze(model, IMAGES)
    with assert_refused(model, "conv9", kind=InputError):
        analysis.explain("conv9")


# Inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["image.png", 3, (2, 3, 8, 8), {"x": [1, 2]}, object(), ()])
def test_inputs_that_hold_no_tensor(inputs: Any) -> None:
    model = residual()
    with assert_refused(model, "inputs", "tensor", kind=InputError):
        depcut.shrink(model, 0.5, inputs)


def test_inputs_that_the_model_does_not_take() -> None:
    model = residual()
    with assert_refused(model, "pictures|unexpected keyword"):
        depcut.shrink(model, 0.5, {"pictures": IMAGES})
    with assert_refused(model, "positional|argument"):
        depcut.shrink(model, 0.5, (IMAGES, IMAGES))


def test_inputs_of_the_wrong_shape_or_type() -> None:
    model = residual()
    with assert_refused(model, "channels|shape|size"):
        depcut.shrink(model, 0.5, normal(2, 4, 8, 8))
    with assert_refused(model, "type|dtype|long|double"):
        depcut.shrink(model, 0.5, IMAGES.double())


def test_inputs_that_cannot_be_inferred() -> None:
    model = NETS["einsum_linear"].build()
    with assert_refused(model, "inputs", "pass", kind=InputError):
        depcut.shrink(model, 0.5)


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Linear, "resnet18", None, [nn.Linear(3, 3)]])
def test_a_model_that_is_no_module(model: Any) -> None:
    with pytest.raises(InputError, match="model"):
        depcut.shrink(model, 0.5, normal(2, 3))


class BranchOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classifier = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:
            x = x.relu()
        return self.classifier(x)


def test_a_model_that_cannot_be_exported_quotes_its_line() -> None:
    model = BranchOnValues()
    with assert_refused(model, "if x.sum() > 0", "test_errors.py", "export", kind=CaptureError):
        depcut.shrink(model, 0.5, normal(2, 6))


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the tide is out")


def test_a_model_that_raises_is_quoted() -> None:
    model = Raises().train()
    with assert_refused(model, "the tide is out", "test_errors.py", kind=CaptureError):
        depcut.shrink(model, 0.5, normal(2, 6))


def test_a_scripted_model_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(NETS["mlp"].build(), normal(2, 6))
    with pytest.raises(CaptureError, match=r"(?s)script.*nn\.Module"):
        depcut.shrink(scripted, 0.5, normal(2, 6))


def test_a_model_that_holds_a_scripted_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.jit.script(nn.Linear(9, 7))
    model = nn.Sequential(nn.Linear(6, 9), inner, nn.Linear(7, 5))
    with pytest.raises(CaptureError, match=r"(?s)script.*'1'"):
        depcut.shrink(model, 0.5, normal(2, 6))


def test_a_quantized_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.nn.quantized.dynamic.Linear(9, 7)
    model = nn.Sequential(nn.Linear(6, 9), quantized, nn.Linear(7, 5))
    with pytest.raises(CaptureError, match=r"(?s)quantized.*'1'.*first"):
        depcut.shrink(model, 0.5, normal(2, 6))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    model = residual()
    with torch.no_grad():
        model.conv1[0].weight[1, 2] = value
    with assert_refused(model, "conv1.0.weight", "finite"):
        depcut.shrink(model, 0.5, IMAGES)


# Plans --------------------------------------------------------------------------------------------


def plan_of(name: str) -> Any:
    net = NETS[name]
    analysis = depcut.analyze(net.build(), net.inputs(2))
    return analysis.plan_keeping({g.name: [0, 1] for g in analysis.groups if g.size > 2})


@pytest.mark.parametrize("other", ["plain", "mlp", "residual_projection", "experts"])
def test_a_plan_for_another_architecture(other: str) -> None:
    plan, model = plan_of("residual"), NETS[other].build()
    with assert_refused(model, "plan", kind=PlanError):
        plan.apply(model)


def test_a_plan_for_another_width_names_tensor_and_sizes() -> None:
    plan, model = plan_of("plain"), NETS["plain"].build()
    model[1][0] = nn.Conv2d(8, 13, 3)
    with assert_refused(model, "1.0.weight", "13", "12", kind=PlanError):
        plan.apply(model)


@pytest.mark.parametrize(
    ("units", "keyword"),
    [([], "empty|at least one|no unit"), ([8], "8"), ([-1], "-1"), ([1, 1], "1"), ([0.5], "0.5")],
)
def test_impossible_units(units: list[Any], keyword: str) -> None:
    model = residual()
    analysis = depcut.analyze(model, IMAGES)
    [group] = [group for group in analysis.groups if group.size == 8]
    with assert_refused(model, group.name, keyword, kind=PlanError):
        analysis.plan_keeping({group.name: units})


def test_an_unknown_group() -> None:
    model = residual()
    analysis = depcut.analyze(model, IMAGES)
    with assert_refused(model, "no_such_group", kind=PlanError):
        analysis.plan_keeping({"no_such_group": [0]})


# The model's own state ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_neither_success_nor_failure_touches_the_model(training: bool) -> None:
    model = residual().train(training)
    model.stem.eval()
    model.tag = 3
    model.head.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    slim = depcut.shrink(model, 0.5, IMAGES, align=1)
    assert_untouched(model, before)
    assert slim.training is training
    assert not slim.stem.training
    assert slim.tag == 3
    for failure in failures():
        with pytest.raises(DepcutError):
            failure(model)
        assert_untouched(model, before)


def failures() -> list[Callable[[nn.Module], Any]]:
    return [
        lambda model: depcut.shrink(model, 2.0, IMAGES),
        lambda model: depcut.shrink(model, 0.9999, IMAGES),
        lambda model: depcut.shrink(model, 0.5, normal(2, 5)),
        lambda model: depcut.shrink(model, 0.5, IMAGES, ignore=["nowhere"]),
    ]
