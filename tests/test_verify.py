"""Verification: what is wrong is found and named, what is merely rounded or random is not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import MLP, NETS, Head, conv, normal, seeded
from oracle import assert_untouched, check, outputs, random_keep, snapshot
from selection import sampled
from torch import Tensor, nn

import depcut
import depcut.apply.plan
import depcut.rewrite.tensors
from depcut.errors import VerificationError
from depcut.ops import registry
from depcut.rewrite.build import Slim
from depcut.support.closeness import relative_error
from depcut.verify.verify import masked_outputs


def plan_of(model: nn.Module, inputs: Any, seed: int = 0) -> Any:
    analysis = depcut.analyze(model, inputs)
    return analysis.plan_keeping(random_keep(analysis, np.random.default_rng(seed)))


def assert_refused(plan: Any, *words: str) -> None:
    """Applying raises an error that names one of the layers; the dense model is untouched."""
    before = snapshot(plan.model)
    with pytest.raises(VerificationError) as caught:
        plan.apply(plan.model)
    message = str(caught.value)
    assert not words or any(f"'{word}" in message for word in words), message
    assert caught.value.remedy
    assert_untouched(plan.model, before)


# Wrong rules --------------------------------------------------------------------------------------


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the rules of some targets for one test."""

    def replace(function: Any, *targets: str) -> None:
        for target in targets:
            monkeypatch.setitem(registry.RULES, target, function)

    return replace


@pytest.mark.parametrize("units", [[2, 5, 7], [2, 5]])
def test_a_rule_that_leaves_two_dimensions_uncoupled(units: list[int], rule: Any) -> None:
    net = NETS["residual"]
    rule(lambda op: op.dims(op.tensors()[0]), "aten.add.Tensor")
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    stem, other = (
        next(g for g in analysis.groups if layer in g.layers) for layer in ("stem.0", "conv2.0")
    )
    assert stem is not other
    assert_refused(analysis.plan_keeping({stem.name: [0, 1, 2], other.name: units}))


def test_a_rule_that_confuses_the_order(rule: Any) -> None:
    net = NETS["concat"]

    def reversed_cat(op: Any) -> Any:
        first, *others = [op.dims(n) for n in op.arg("tensors")][::-1]
        width = depcut.axes.concat(first[1], *(other[1] for other in others))
        return (first[0], width, *first[2:])

    rule(reversed_cat, "aten.cat", "aten.cat.default")
    assert_refused(plan_of(net.build(), net.inputs(2)))


def test_a_rule_that_forgets_a_statistic(rule: Any) -> None:
    net = NETS["rms_norm"]
    original = registry.rule_for(torch.ops.aten.rms_norm.default)

    def pointwise_norm(op: Any) -> Any:
        out = original(op)
        op.effects.statistics.clear()
        return out

    rule(pointwise_norm, "aten.rms_norm.default")
    assert_refused(plan_of(net.build(), net.inputs(2)))


def test_a_rule_that_forgets_a_size(rule: Any) -> None:
    """A literal that nobody reports stays dense, and the view fails or is generated wrongly."""
    net = NETS["attention_fused"]
    original = registry.rule_for(torch.ops.aten.reshape.default)

    def silent(op: Any) -> Any:
        out = original(op)
        op.effects.literals.clear()
        return out

    rule(silent, "aten.reshape.default", "aten.view.default")
    assert_refused(plan_of(net.build(), net.inputs(2)))


# Corrupted models ---------------------------------------------------------------------------------


def tamper(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], None]) -> None:
    """Let `change` spoil every rewritten model before it is verified."""
    rewrite = depcut.apply.plan.rewrite

    def spoiled(model: nn.Module, keep: Any) -> Slim:
        slim = rewrite(model, keep)
        with torch.no_grad():
            change(slim.model)
        return slim

    monkeypatch.setattr(depcut.apply.plan, "rewrite", spoiled)


WRONG_NUMBERS = [
    ("residual", "conv1.0", "weight"),
    ("residual", "stem.1", "running_mean"),
    ("residual", "head.classifier", "bias"),
    ("vision_transformer", "mlp.up", "bias"),
    ("vision_transformer", "norm1", "weight"),
    ("attention_fused", "attention.qkv", "weight"),
    ("lstm", "cell", "weight_hh_l0"),
]


def with_wrong_number(
    name: str, layer: str, tensor: str, monkeypatch: pytest.MonkeyPatch
) -> depcut.Plan:
    def change(slim: nn.Module) -> None:
        getattr(slim.get_submodule(layer), tensor).view(-1)[0] += 1.0

    net = NETS[name]
    plan = plan_of(net.build(), net.inputs(2))
    plan.apply(plan.model)
    tamper(monkeypatch, change)
    return plan


@pytest.mark.parametrize(("name", "layer", "tensor"), WRONG_NUMBERS)
def test_the_layer_with_a_wrong_number_is_named(
    name: str, layer: str, tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(with_wrong_number(name, layer, tensor, monkeypatch), layer)


def test_exchanged_channels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take = depcut.reference.slices.take

    def mirrored(tensor: Tensor, picked: Any) -> Tensor:
        made = take(tensor, picked)
        return made.flip(1) if made.dim() == 4 and picked[1] is not None else made

    monkeypatch.setattr(depcut.rewrite.tensors, "take", mirrored)
    net = NETS["residual"]
    assert_refused(plan_of(net.build(), net.inputs(2)))


def test_what_leaks_from_removed_channels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroed producers would leave the shift of their norm behind; that is another model."""
    net = NETS["plain"]
    model, inputs = net.build(), net.inputs(2)
    analysis = depcut.analyze(model, inputs)
    group = next(g for g in analysis.groups if "1.0" in g.layers)
    plan = analysis.plan_keeping({group.name: [u for u in range(group.size) if u != 1]})
    norm, classifier = model[1][1], model[2].classifier
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    left = nn.functional.silu(norm.bias - norm.running_mean * scale)[1]
    assert (left * classifier.weight[:, 1]).abs().max() > 1e-3

    def leak(slim: nn.Module) -> None:
        slim[2].classifier.bias += left * classifier.weight[:, 1]

    plan.apply(model)
    tamper(monkeypatch, leak)
    assert_refused(plan)


@pytest.mark.usefixtures("only_generated")
def test_a_wrong_shape_inside_is_found_and_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean pooling and a head of zeros hide it from the outputs."""
    model = nn.Sequential(conv(3, 8), conv(8, 12), Head(12)).eval()
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)

    def change(slim: nn.Module) -> None:
        slim[1][0].padding = (0, 0)

    plan = plan_of(model, normal(2, 3, 8, 8))
    tamper(monkeypatch, change)
    slim = plan.apply(model)
    [(name, reason)] = depcut.report(slim).generated.items()
    assert name == "1.0"
    assert "shape" in reason
    assert slim[:2](normal(2, 3, 8, 8)).shape[2:] == (8, 8)


@pytest.mark.parametrize("layer", ["0.0", "1.0"])
def test_a_head_of_zeros_does_not_hide_what_comes_before(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 12), Head(12)).eval()
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    plan = plan_of(model, normal(2, 3, 8, 8))
    assert not outputs(plan.apply(model), normal(2, 3, 8, 8))[0].any()

    def change(slim: nn.Module) -> None:
        slim.get_submodule(layer).weight.view(-1)[0] += 1.0

    tamper(monkeypatch, change)
    assert_refused(plan)


def test_a_lost_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(slim: nn.Module) -> None:
        forward = slim.forward
        slim.forward = lambda x: forward(x)[0]

    net = NETS["auxiliary_outputs"]
    plan = plan_of(net.build(), net.inputs(2))
    tamper(monkeypatch, change)
    assert_refused(plan)


def test_a_model_that_is_right_is_not_generated() -> None:
    for name in ("residual", "vision_transformer", "window_attention"):
        net = NETS[name]
        plan = plan_of(net.build(), net.inputs(2))
        slim = plan.apply(plan.model)
        assert depcut.report(slim).generated == {}
        assert depcut.report(slim).error < 1e-5


# Code that computes something else at the new size -----------------------------------------------


class Scaled(nn.Module):
    """An attribute that is a size in one place and a number in another."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).view(-1, self.width) / math.sqrt(self.width)
        return self.down(y.sigmoid())


def with_scale() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), Scaled(), nn.Linear(6, 5))


@pytest.mark.usefixtures("only_generated")
def test_a_number_that_would_change_with_the_size_is_pinned() -> None:
    model, inputs = seeded(with_scale, 0), normal(2, 4)
    plan = plan_of(model, inputs)
    slim = plan.apply(model)
    assert list(depcut.report(slim).generated) == ["1"]
    assert re.search("computes other values|3.4641", depcut.report(slim).generated["1"])
    assert "3.4641" in slim[1].code
    expected = masked_outputs(plan.keep(), model, inputs)
    torch.testing.assert_close(slim(inputs), expected[0], rtol=1e-5, atol=1e-6)
    assert type(slim) is type(model)


def test_pinned_numbers_pass_every_comparison() -> None:
    check(seeded(with_scale, 0), lambda batch: normal(batch, 4), seeds=(0, 1, 2), alone=True)


class ShapeScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y * y.shape[-1] ** -0.5)


@pytest.mark.usefixtures("only_generated")
def test_a_number_computed_from_a_shape_is_pinned() -> None:
    model, inputs = seeded(ShapeScaled, 0), normal(2, 6)
    plan = plan_of(model, inputs)
    slim = plan.apply(model)
    assert list(depcut.report(slim).generated) == [""]
    expected = masked_outputs(plan.keep(), model, inputs)
    torch.testing.assert_close(slim(inputs), expected[0], rtol=1e-5, atol=1e-6)


class Branches(nn.Module):
    """Its code takes another path at another width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y.sigmoid() if y.shape[-1] > 11 else y.tanh())


@pytest.mark.usefixtures("only_generated")
def test_a_branch_on_a_width_is_pinned() -> None:
    model, inputs = seeded(Branches, 0), normal(2, 6)
    plan = plan_of(model, inputs)
    slim = plan.apply(model)
    assert list(depcut.report(slim).generated) == [""]
    assert "sigmoid" in slim.code
    assert "tanh" not in slim.code


class InsistsOnItsWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if y.shape[-1] != 12:
            raise ValueError(f"twelve features, not {y.shape[-1]}")
        return self.down(y)


@pytest.mark.usefixtures("only_generated")
def test_code_that_raises_at_another_width_is_generated() -> None:
    model, inputs = seeded(InsistsOnItsWidth, 0), normal(2, 6)
    plan = plan_of(model, inputs)
    slim = plan.apply(model)
    assert list(depcut.report(slim).generated) == [""]
    assert "twelve features" in depcut.report(slim).generated[""]
    assert slim(normal(3, 6)).shape == (3, 5)


# Chance, numbers that are none, precision ---------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.mlp, self.head = nn.Linear(6, 9), MLP(9, 13), nn.Linear(9, 5)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.mlp(x + self.draw(x)))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape[0], 1),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=True),
    "in place": lambda x: torch.empty_like(x).normal_(),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_model_that_draws_is_shrunk(kind: str) -> None:
    model, inputs = seeded(lambda: Noisy(DRAWS[kind]), 0), normal(2, 6)
    assert not torch.equal(model(inputs), model(inputs))
    plan = plan_of(model, inputs)
    slim = plan.apply(model)
    assert slim(normal(3, 6)).shape == (3, 5)
    assert depcut.report(slim).generated == {}
    assert slim.mlp.up.out_features < 13


def test_a_model_that_draws_is_still_checked_for_its_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(seeded(lambda: Noisy(torch.rand_like), 0), normal(2, 6))

    def change(slim: nn.Module) -> None:
        slim.head = nn.Linear(slim.head.in_features, 4)

    tamper(monkeypatch, change)
    assert_refused(plan)


class Logarithm(nn.Module):
    """Not a number wherever the stem is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mlp, self.head = nn.Linear(6, 9), nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.mlp(x).sigmoid()), x.sum(-1).log()


def test_what_is_no_number_in_both_models_is_equal() -> None:
    model, inputs = seeded(Logarithm, 0), normal(4, 6)
    assert outputs(model, inputs)[1].isnan().any()
    plan = plan_of(model, inputs)
    slim = plan.apply(model)
    assert depcut.report(slim).error < 1e-5


def test_what_is_no_number_in_the_slim_model_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(slim: nn.Module) -> None:
        slim.head.weight.view(-1)[0] = math.nan

    plan = plan_of(seeded(Logarithm, 0), normal(4, 6))
    tamper(monkeypatch, change)
    assert_refused(plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", sampled(["residual", "vision_transformer", "mlp"], ["residual"]))
def test_a_model_of_another_precision_passes(name: str, dtype: torch.dtype) -> None:
    net = NETS[name]
    model, inputs = net.build().to(dtype), net.inputs(2).to(dtype)
    plan = plan_of(model, inputs)
    slim = plan.apply(model)
    assert depcut.report(slim).generated == {}
    assert {p.dtype for p in slim.parameters()} == {dtype}
    assert depcut.report(slim).error < {torch.float64: 1e-12}.get(dtype, 5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_coarse_precision_does_not_hide_a_wrong_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(slim: nn.Module) -> None:
        slim.conv1[0].weight[0] *= -3

    net = NETS["residual"]
    plan = plan_of(net.build().to(dtype), net.inputs(2).to(dtype))
    tamper(monkeypatch, change)
    assert_refused(plan)


def test_a_small_error_in_single_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(slim: nn.Module) -> None:
        slim.conv1[0].weight *= 1.003

    net = NETS["residual"]
    plan = plan_of(net.build(), net.inputs(2))
    tamper(monkeypatch, change)
    assert_refused(plan)


# The measure --------------------------------------------------------------------------------------


def test_differences_are_relative_to_the_largest_value() -> None:
    want = torch.tensor([100.0, 0.0])
    size, message = relative_error([want, 3], [want + torch.tensor([0.0, 1.0]), 4])
    assert (size, message) == (pytest.approx(0.01), "")
    assert relative_error([torch.zeros(3)], [torch.full((3,), 0.5)])[0] == pytest.approx(0.5)
    assert relative_error([torch.tensor([1, 2])], [torch.tensor([1, 2])]) == (0.0, "")
    assert relative_error([torch.zeros(0)], [torch.zeros(0)]) == (0.0, "")


@pytest.mark.parametrize(
    ("want", "have", "word"),
    [
        ([torch.zeros(2)], [], "0 outputs instead of 1"),
        ([torch.zeros(2)], [torch.zeros(3)], "shape (3,) instead of (2,)"),
        ([torch.zeros(2)], [None], "shape () instead of (2,)"),
        ([torch.zeros(2)], [torch.tensor([0.0, math.nan])], "not finite"),
        ([torch.tensor([0.0, math.inf])], [torch.zeros(2)], "not finite"),
        ([torch.tensor([0.0, math.inf])], [torch.tensor([0.0, -math.inf])], "not finite"),
        ([torch.tensor([0.0, math.inf])], [torch.tensor([0.0, math.nan])], "not finite"),
    ],
)
def test_what_cannot_be_measured_is_an_infinite_difference(
    want: list[Any], have: list[Any], word: str
) -> None:
    size, message = relative_error(want, have)
    assert size == math.inf
    assert word in message


def test_complex_values_are_compared() -> None:
    want = torch.tensor([3 + 4j, 0j])
    assert relative_error([want], [want.clone()]) == (0.0, "")
    assert relative_error([want], [want + torch.tensor([0j, 1j])])[0] == pytest.approx(0.2)


def test_equal_infinities_are_equal() -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert relative_error([values], [values.clone()]) == (0.0, "")


def test_verifying_changes_neither_modes_nor_statistics() -> None:
    net = NETS["residual"]
    model = net.build().train()
    model.stem.eval()
    before = snapshot(model)
    slim = plan_of(model, net.inputs(2)).apply(model)
    assert_untouched(model, before)
    assert (slim.training, slim.stem.training) == (True, False)
    assert int(slim.conv1[1].num_batches_tracked) == 0
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in slim.modules()] == [0] * len(
        list(slim.modules())
    )
