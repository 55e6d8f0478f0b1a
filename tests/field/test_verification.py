"""Verification by value: each fault here is one that shapes, or a coarse scale, do not show."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from nets import normal, seeded
from oracle import random_keep
from selection import sampled
from torch import Tensor, nn
from torch.nn import functional

import depcut
import depcut.apply.plan
from depcut.errors import VerificationError
from depcut.rewrite.build import Slim

Change = Callable[[nn.Module], None]


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Spoil every model that is rewritten from here on, before it is verified."""

    def spoil(change: Change) -> None:
        rewrite = depcut.apply.plan.rewrite

        def spoiled(model: nn.Module, keep: Any) -> Slim:
            slim = rewrite(model, keep)
            with torch.no_grad():
                change(slim.model)
            return slim

        monkeypatch.setattr(depcut.apply.plan, "rewrite", spoiled)

    return spoil


def plan_of(model: nn.Module, inputs: Any, seed: int = 0) -> Any:
    analysis = depcut.analyze(model, inputs)
    return analysis.plan_keeping(random_keep(analysis, np.random.default_rng(seed)))


def changed(slim: nn.Module) -> dict[str, str]:
    """Modules that were patched or generated."""
    report = depcut.report(slim)
    return {**report.patched, **report.generated}


def assert_refused(plan: Any, word: str = ".") -> None:
    with pytest.raises(VerificationError, match=word):
        plan.apply(plan.model)


def scaled(name: str, factor: float) -> Change:
    def change(slim: nn.Module) -> None:
        slim.get_parameter(name).mul_(factor)

    return change


# Random numbers -----------------------------------------------------------------------------------


class Drawing(nn.Module):
    """Draws between two layers whose widths shrink."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.draw = nn.Linear(6, 12), nn.Linear(12, 5), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.draw(self.up(x)))


def fused(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (4, 3)).transpose(-2, -3)
    x = functional.scaled_dot_product_attention(x, x, x, dropout_p=0.3)
    return x.transpose(-2, -3).flatten(-2)


def shuffled(x: Tensor) -> Tensor:
    """Of a masked autoencoder: a random part of the positions stays."""
    order = torch.rand(x.shape[0], x.shape[1]).argsort(1)[:, :3]
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(x, 0.5, training=True),
    "channel dropout": lambda x: functional.dropout1d(x.transpose(1, 2), 0.5, True).transpose(1, 2),
    "rand_like": lambda x: x * torch.rand_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "normal": lambda x: x + torch.normal(0.0, 1.0, x.shape),
    "in place": lambda x: x + torch.empty_like(x).normal_(),
    "multinomial": lambda x: x[:, torch.multinomial(torch.ones(7), 3)],
    "randperm": lambda x: x[:, torch.randperm(7)],
    "gumbel": lambda x: x * functional.gumbel_softmax(x, dim=1),
    "stochastic depth": lambda x: x + torch.tanh(x) * (torch.rand(len(x), 1, 1) < 0.5),
    "attention": fused,
    "masked": shuffled,
}


QUICK = ["dropout", "bernoulli", "multinomial", "attention", "masked"]


@pytest.mark.parametrize("kind", sampled(list(DRAWS), QUICK))
def test_a_model_that_draws_is_compared_by_value(
    kind: str, tamper: Callable[[Change], None]
) -> None:
    model, inputs = seeded(lambda: Drawing(DRAWS[kind]), 0), normal(2, 7, 6)
    plan = plan_of(model, inputs)
    state = torch.get_rng_state()
    slim = plan.apply(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert depcut.report(slim).generated == {} or kind == "attention"
    assert depcut.report(slim).error < 1e-4
    assert slim.down.in_features < 12
    tamper(scaled("down.weight", 1.01))
    assert_refused(plan)


def test_a_wrong_scale_before_a_draw_is_found(tamper: Callable[[Change], None]) -> None:
    plan = plan_of(seeded(lambda: Drawing(DRAWS["dropout"]), 0), normal(2, 7, 6))
    tamper(scaled("up.weight", 1.01))
    assert_refused(plan)


class Extra(nn.Module):
    """Draws once more where it is narrow, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if x.shape[-1] < 12:
            x = x + torch.rand_like(x)
        return self.down(x + torch.rand_like(x))


def test_draws_that_the_dense_model_does_not_make_are_no_excuse() -> None:
    model = seeded(Extra, 0)
    slim = plan_of(model, normal(2, 6)).apply(model)
    assert list(depcut.report(slim).patched) == [""]
    torch.manual_seed(0)
    slim(normal(2, 6))
    left = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(2, slim.up.out_features)
    assert torch.equal(torch.get_rng_state(), left)


class Coin(nn.Module):
    """Python's own dice decide whether a branch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for _ in range(8):
            x = torch.tanh(x) if random.random() < 0.5 else torch.sigmoid(x)
            x = x * float(np.random.rand())  # noqa: NPY002
        return self.down(x)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_draws_in_python_takes_the_course_it_was_captured_with(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    slim = plan_of(seeded(Coin, 0), normal(2, 6)).apply(seeded(Coin, 0))
    assert depcut.report(slim).generated == {}
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


# Scales and tolerances ----------------------------------------------------------------------------


class Masked(nn.Module):
    """Logits, some of which are masked."""

    def __init__(self, mask: float, additive: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12, dtype=dtype), nn.Linear(12, 8, dtype=dtype)
        self.mask, self.additive = mask, additive

    def forward(self, x: Tensor) -> Tensor:
        logits = self.down(self.up(x).relu())
        allowed = torch.arange(8) % 3 > 0
        if self.additive:
            return logits + torch.where(allowed, 0.0, self.mask).to(logits.dtype)
        return logits.masked_fill(~allowed, self.mask)


SINGLE, BRAIN = torch.float32, torch.bfloat16
MASKS = {
    "-1e9": (-1e9, False, SINGLE),
    "-1e4 added": (-1e4, True, SINGLE),
    "-1e9 added": (-1e9, True, SINGLE),
    "-inf": (-float("inf"), False, SINGLE),
    "finfo.min": (torch.finfo(SINGLE).min, False, SINGLE),
    "finfo.min of bfloat16": (torch.finfo(BRAIN).min, False, BRAIN),
}


@pytest.mark.parametrize("kind", sampled(list(MASKS), ["-1e4 added", "finfo.min of bfloat16"]))
def test_masked_logits_do_not_set_the_scale(
    kind: str, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Change], None]
) -> None:
    mask, additive, dtype = MASKS[kind]
    plan = plan_of(seeded(lambda: Masked(mask, additive, dtype), 0), normal(2, 6).to(dtype))
    plan.apply(plan.model)
    # As if the network had no modules but itself: the outputs alone must tell.
    monkeypatch.setattr(depcut.verify.module_results._Watcher, "watch", lambda *_: None)
    factor = sqrt(2)
    tamper(lambda slim: [p.mul_(factor) for p in slim.down.parameters()])
    assert_refused(plan, "differ by")


class OneCoarse(nn.Module):
    """A single-precision network with one half-precision tensor, beside its path or in it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)
        self.table, self.inside = nn.Parameter(torch.rand(5) + 0.5), inside

    def forward(self, x: Tensor) -> Any:
        y, scale = self.down(self.up(x).relu()), self.table.bfloat16()
        return y * scale.float() if self.inside else (y, scale)


@pytest.mark.parametrize("inside", [False, True])
def test_one_coarse_tensor_does_not_set_the_tolerance(
    inside: bool, tamper: Callable[[Change], None]
) -> None:
    plan = plan_of(seeded(lambda: OneCoarse(inside), 0), normal(2, 6))
    assert depcut.report(plan.apply(plan.model)).error < 1e-2
    tamper(lambda slim: [p.mul_(1.067) for p in slim.down.parameters()])
    assert_refused(plan)


class Gate(nn.Module):
    """Takes a factor that it uses on demand alone."""

    strong = False

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.strong:
            return x * factor
        return x * 2


class Gated(nn.Module):
    """Computes a factor for a later call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(6, 12), Gate(), nn.Linear(12, 5)
        self.factor = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.up(x).relu(), self.factor * 3))


def test_arguments_that_nothing_computes_with_are_compared(
    tamper: Callable[[Change], None],
) -> None:
    plan = plan_of(seeded(Gated, 0), normal(2, 6))
    plan.apply(plan.model)
    tamper(scaled("factor", 1.5))
    assert_refused(plan)


class Rounds(nn.Module):
    """Everything passes through half precision, and is rounded there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.down(self.up(x).relu()).float()


def test_an_autocast_region_is_rounding_but_no_excuse(tamper: Callable[[Change], None]) -> None:
    plan = plan_of(seeded(Rounds, 0), normal(4, 6))
    assert depcut.report(plan.apply(plan.model)).generated == {}
    tamper(lambda slim: [p.mul_(1.067) for p in slim.down.parameters()])
    assert_refused(plan)


class Chooses(nn.Module):
    """Returns positions, and whether something is positive, and nothing else."""

    def __init__(self, ties: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.ties = nn.Linear(6, 12), nn.Linear(12, 40), ties

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(self.up(x).relu())
        y = torch.cat([y, y.flip(-1)], -1) if self.ties else y
        return y.argmax(-1), y > 0.3


def test_integers_and_flags_are_compared_exactly(
    monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Change], None]
) -> None:
    plan = plan_of(seeded(Chooses, 0), normal(64, 6))
    plan.apply(plan.model)
    monkeypatch.setattr(depcut.verify.module_results._Watcher, "watch", lambda *_: None)
    tamper(scaled("down.bias", 1.2))
    assert_refused(plan, "differ by")


def test_ties_that_rounding_decides_are_decided_in_double_precision() -> None:
    slim = plan_of(seeded(lambda: Chooses(ties=True), 0), normal(64, 6)).apply(
        seeded(lambda: Chooses(ties=True), 0)
    )
    assert depcut.report(slim).generated == {}


# Inputs that excite nothing -----------------------------------------------------------------------


class Bare(nn.Module):
    """Without shifts: zeros in, zeros out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_constant_inputs_are_replaced_by_drawn_ones(
    fill: float, tamper: Callable[[Change], None]
) -> None:
    inputs = torch.full((2, 6), fill)
    plan = plan_of(seeded(Bare, 0), inputs)
    assert not inputs.sub(fill).any()
    plan.apply(plan.model)
    tamper(scaled("down.weight", 2))
    assert_refused(plan)


class Words(nn.Module):
    """The padding token's embedding is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids.clamp(min=0)[:, 1:]) * mask[:, 1:, None]
        return self.down(self.up(x).relu())


def test_equal_tokens_are_replaced_by_drawn_ones(tamper: Callable[[Change], None]) -> None:
    inputs = (torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long))
    plan = plan_of(seeded(Words, 0), inputs)
    plan.apply(plan.model)
    tamper(scaled("down.weight", 2))
    assert_refused(plan)


# Numbers that the code computes -------------------------------------------------------------------


class Attention(nn.Module):
    """Its scale is computed out of sight; at initialisation the scores are all but equal."""

    def __init__(self, root: Callable[[Any], Any], spread: float, closed: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 16) for _ in range(3))
        self.out, self.root = nn.Linear(16, 8), root
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)
        if closed:
            nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / self.root(q.size(-1))).softmax(-1)
        return x + self.out((scores @ v).transpose(1, 2).flatten(2))


ROOTS: dict[str, Callable[[Any], Any]] = {
    "math.sqrt": sqrt,
    "numpy.sqrt": np.sqrt,
    "float": lambda n: float(n) ** 0.5,
    "inverse": lambda n: 1 / float(n),
    "torch.sqrt": lambda n: torch.sqrt(torch.tensor(float(n))),
}


@pytest.mark.parametrize("spread", [0.5, 1e-4])
@pytest.mark.parametrize("root", sampled(list(ROOTS), ["math.sqrt", "torch.sqrt"]))
def test_a_scale_that_is_computed_out_of_sight_is_found(root: str, spread: float) -> None:
    model = seeded(lambda: nn.Sequential(Attention(ROOTS[root], spread, False)), 0).eval()
    inputs = normal(2, 5, 8)
    analysis = depcut.analyze(model, inputs)
    narrow = next(g for g in analysis.groups if "0.q" in g.layers and g.size == 4)
    plan = analysis.plan_keeping({g.name: [0, 2] for g in analysis.groups if g.size == 4})
    assert narrow.size == 4
    slim = plan.apply(model)
    assert changed(slim), "its scale is another one at the new width"
    with torch.no_grad():
        for layer in (model[0].q, model[0].k):
            layer.weight.mul_(0.5 / spread)
        for name in ("q", "k"):
            slim[0].get_parameter(f"{name}.weight").mul_(0.5 / spread)
        [expected] = depcut.verify.verify.masked_outputs(plan.keep(), model, inputs)
        torch.testing.assert_close(slim(inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_closed_output_does_not_hide_a_wrong_scale() -> None:
    model = seeded(lambda: nn.Sequential(Attention(sqrt, 0.5, True), nn.Linear(8, 3)), 0).eval()
    analysis = depcut.analyze(model, normal(2, 5, 8))
    plan = analysis.plan_keeping({g.name: [0, 2] for g in analysis.groups if g.size == 4})
    assert list(changed(plan.apply(model))) == ["0"]


# After the rewrite --------------------------------------------------------------------------------


class Shifted(nn.Sequential):
    """Some of its hidden units are constants."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5), nn.Linear(5, 3))
        with torch.no_grad():
            self[0].weight[:4] = 0
            self[0].bias[:4] = 1.5


def with_constants() -> tuple[Any, nn.Module]:
    model, inputs = seeded(Shifted, 0), normal(8, 6)
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = 1.5
    analysis = depcut.analyze(model, inputs)
    group = next(g for g in analysis.groups if "0" in g.layers)
    return analysis.plan_keeping({group.name: [2, 3, 5, 6, 7, 8, 9]}), model


def test_folded_constants_are_checked_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = with_constants()
    slim = plan.apply(model)
    assert not torch.equal(slim[2].bias, model[2].bias)
    folding = depcut.repair.folding
    contributions = folding.contributions
    monkeypatch.setattr(
        folding, "contributions", lambda *a: {n: 2 * v for n, v in contributions(*a).items()}
    )
    assert_refused(plan, "after the repair")


def test_folding_changes_what_it_says_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = with_constants()
    fold = depcut.repair.after_rewrite.fold_constants

    def careless(keep: Any, model: nn.Module, slim: nn.Module, *rest: Any) -> Any:
        names = fold(keep, model, slim, *rest)
        slim[3].weight.data[0, 0] += 1e-6
        return names

    monkeypatch.setattr(depcut.repair.after_rewrite, "fold_constants", careless)
    assert_refused(plan, "not the kept slice")


def compensated(factor: float, tensor: str) -> Callable[..., Any]:
    compensate = depcut.repair.after_rewrite.compensate

    def careless(slim: nn.Module, *rest: Any) -> Any:
        done = compensate(slim, *rest)
        slim.get_parameter(tensor).data.mul_(factor)
        return done

    return careless


@pytest.mark.parametrize(("factor", "tensor"), [(1.0, "2.weight"), (1.001, "0.weight")])
def test_compensation_changes_what_it_says_and_nothing_else(
    factor: float, tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, model = with_constants()
    careless = compensated(factor, tensor)
    monkeypatch.setattr(depcut.repair.after_rewrite, "compensate", careless)
    data = [normal(32, 6)]
    if factor == 1:
        slim = plan.apply(model, data=data)
        assert depcut.report(slim).compensation.repairs
        return
    with pytest.raises(VerificationError, match="not the kept slice"):
        plan.apply(model, data=data)


def test_a_compensated_model_computes_what_its_weights_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, model = with_constants()
    compensate = depcut.repair.after_rewrite.compensate

    def careless(slim: nn.Module, *rest: Any) -> Any:
        done = compensate(slim, *rest)
        slim[2].forward = lambda x: 1.01 * functional.linear(x, slim[2].weight, slim[2].bias)
        return done

    monkeypatch.setattr(depcut.repair.after_rewrite, "compensate", careless)
    with pytest.raises(VerificationError, match="after the repair"):
        plan.apply(model, data=[normal(32, 6)])


# Another batch, another length --------------------------------------------------------------------


def halves(model: nn.Module, inputs: Tensor) -> Any:
    """A plan that keeps half of every group, evenly."""
    analysis = depcut.analyze(model, inputs)
    return analysis.plan_keeping({g.name: range(0, g.size, 2) for g in analysis.groups})


class Limited(nn.Module):
    """One attribute is a width in one place and a length in another."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 12
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).view(x.shape[0], -1, self.n)
        if x.shape[1] > self.n:
            y = y.tanh()
        return self.down(y)


@pytest.mark.parametrize("length", [5, 18])
def test_a_width_that_is_a_length_elsewhere_is_found(length: int) -> None:
    """With 12 features cut to 6, it goes wrong where the length is between."""
    model, inputs = seeded(Limited, 0).eval(), normal(2, length, 6)
    slim = halves(model, inputs).apply(model)
    assert changed(slim)
    for other in (5, 9, 18):
        x = normal(2, other, 6)
        try:
            out = slim(x)
        except depcut.errors.DepcutError:
            continue
        with torch.no_grad():
            y = model.up(x)[..., ::2]
            y = y.tanh() if other > 12 else y
            right = functional.linear(y, model.down.weight[:, ::2], model.down.bias)
        torch.testing.assert_close(out, right)


class Follows(nn.Module):
    """Takes any length, and reads an attribute for a width."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.out = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], self.heads, 3).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, q, q)
        return self.out(y.transpose(1, 2).flatten(2)) * (x.shape[1] ** -0.5)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every other length that was tried."""
    seen: list[Any] = []
    module = depcut.verify.verify
    differs = module.differs_at
    monkeypatch.setattr(module, "differs_at", lambda *a: seen.append(differs(*a)) or seen[-1])
    return seen


def heads_of(model: nn.Module, inputs: Tensor) -> Any:
    analysis = depcut.analyze(model, inputs)
    return analysis.plan_keeping({g.name: [0, 2] for g in analysis.groups if g.size == 4})


def test_code_that_follows_its_length_is_tried_and_left_alone(lengths: list[Any]) -> None:
    model = seeded(Follows, 0).eval()
    slim = heads_of(model, normal(2, 8, 6)).apply(model)
    assert lengths == [None, None]
    assert not changed(slim)
    assert slim(normal(2, 5, 6)).shape == (2, 5, 6)


def test_plain_slicing_tries_no_other_length(lengths: list[Any]) -> None:
    model = seeded(Bare, 0).eval()
    plan_of(model, normal(2, 6)).apply(model)
    assert lengths == []


def test_a_fault_at_another_length_is_found(tamper: Callable[[Change], None]) -> None:
    model = seeded(Follows, 0).eval()
    plan = heads_of(model, normal(2, 8, 6))

    def change(slim: nn.Module) -> None:
        forward = slim.forward
        slim.forward = lambda x: forward(x) if x.shape[1] == 8 else 2 * forward(x)

    tamper(change)
    assert "another length" in changed(plan.apply(model))[""]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_fault_at_another_batch_size_is_found(
    rows: int, tamper: Callable[[Change], None]
) -> None:
    plan = plan_of(seeded(Bare, 0), normal(3, 6))
    plan.apply(plan.model)

    def change(slim: nn.Module) -> None:
        forward = slim.down.forward
        slim.down.forward = lambda x: 2 * forward(x) if x.shape[0] == rows else forward(x)

    tamper(change)
    assert_refused(plan)


class Padded(nn.Sequential):
    """A constant channel's contribution depends on how much of the image is border."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(nn.Linear(8, 5))


def test_what_is_folded_is_compared_at_another_image_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = seeded(Padded, 0).eval()
    with torch.no_grad():
        model[0].weight[:3] = 0
    inputs = normal(2, 3, 8, 8)
    depcut.compact(model, inputs)
    apply = depcut.dead_units.Plan.apply

    def careless(self: Any, *args: Any, **given: Any) -> nn.Module:
        slim = apply(self, *args, **given)
        forward = slim.forward
        slim.forward = lambda x: forward(x) * (x.shape[-1] / 8)
        return slim

    monkeypatch.setattr(depcut.dead_units.Plan, "apply", careless)
    with pytest.raises(VerificationError, match="another length or image size"):
        depcut.compact(model, inputs)


# No trace -----------------------------------------------------------------------------------------


class Leaves(nn.Module):
    """Counts, caches, draws, sets flags; and may raise at another width, in the middle of it."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.up, self.down, self.raises = nn.Linear(6, 12), nn.Linear(12, 5), raises
        self.calls, self.cache, self.notes = 0, {}, []
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache[self.calls] = x.shape
        self.notes.append(self.calls)
        self.seen.add_(1)
        y = functional.dropout(self.up(x), 0.1, training=True)
        if not torch.compiler.is_compiling():
            torch.set_default_dtype(torch.float64)
            if self.raises and y.shape[-1] < 12:
                torch.set_grad_enabled(False)
                raise ValueError("too narrow")
        return self.down(y) + 0 * self.seen


@pytest.mark.parametrize("fault", ["none", "raises", "refused"])
def test_a_check_leaves_no_trace(fault: str, tamper: Callable[[Change], None]) -> None:
    model, inputs = seeded(lambda: Leaves(fault == "raises"), 0).eval(), normal(2, 6)
    plan = plan_of(model, inputs)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    slims: list[nn.Module] = []
    tamper(slims.append)
    if fault == "refused":
        tamper(scaled("down.weight", 2))
        assert_refused(plan)
    else:
        slims.append(plan.apply(model))
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(now[0], states[0])
    assert now[1:] == states[1:]
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    for one in (model, *slims):
        assert (one.calls, one.cache, one.notes) == (0, {}, [])
        assert not one.seen.any()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())
