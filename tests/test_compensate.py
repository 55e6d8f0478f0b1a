"""Compensation: exact where what stays gives what was removed, least squares elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from nets import NETS, Net, normal
from selection import SAMPLE, sampled
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import depcut
from depcut.calibration.folds import Folds
from depcut.calibration.moments import Moments
from depcut.calibration.solve import RIDGES, solve
from depcut.errors import InputError
from depcut.support.processes import ALONE

# Ridge of the variance at most 1e-6, thus errors of its square root.
EXACT = 1e-3


def data_of(net: Net, batches: int = 3, rows: int = 6) -> list[Any]:
    """Noise of the shapes of a net's inputs."""
    generator = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        floating = t.is_floating_point() and t.ndim > 1
        return torch.randn(t.shape, generator=generator).to(t.dtype) if floating else t

    def drawn() -> Any:
        x = net.inputs(rows)
        if isinstance(x, dict):
            return {name: noise(t) for name, t in x.items()}
        return tuple(map(noise, x)) if isinstance(x, tuple) else noise(x)

    return [drawn() for _ in range(batches)]


def missed(model: nn.Module, slim: nn.Module, data: Sequence[Any]) -> float:
    """Squared error of the outputs, relative to their squares."""
    error = energy = 0.0
    for x in data:
        for a, b in zip(oracle.outputs(model, x), oracle.outputs(slim, x), strict=True):
            if a.is_floating_point():
                error += float((a - b).double().square().sum())
                energy += float(a.double().square().sum())
    return error / energy


def repaired(
    model: nn.Module, data: Sequence[Any], kept: dict[str, Any] | Callable[[Any], Any], **more: Any
) -> tuple[nn.Module, Any, depcut.Plan]:
    """(slim, what was done, plan), and the model as before."""
    before = oracle.snapshot(model)
    analysis = depcut.analyze(model, data[0])
    plan = analysis.plan_keeping(kept(analysis) if callable(kept) else kept)
    slim = plan.apply(model, data=data, progress=False, **more)
    done = depcut.report(slim).compensation
    oracle.assert_untouched(model, before)
    assert type(slim) is type(plan.apply(model, compensate=False))
    return slim, done, plan


# Exactness ---------------------------------------------------------------------------------------


def doubled(half: int) -> Callable[[Any], Any]:
    """Keep the first half of every group of twice that size."""
    return lambda a: {g.name: range(half) for g in a.groups if g.size == 2 * half}


def twice(*tensors: Tensor, dim: int = 0) -> None:
    """Make the second half of a dimension the first half again."""
    for t in tensors:
        half = t.shape[dim] // 2
        t.data.narrow(dim, half, half).copy_(t.data.narrow(dim, 0, half))


def mlp() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    twice(model[0].weight, model[0].bias)
    return model, lambda: torch.randn(64, 6)


def without_biases() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(6, 8, False), nn.Tanh(), nn.Linear(8, 5, False))
    twice(model[0].weight)
    return model, lambda: torch.randn(64, 6)


def combinations() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight[4:] = torch.randn(4, 4) @ model[0].weight[:4]
    return model, lambda: torch.randn(64, 6)


def constants() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight[4:] = 0
    return model, lambda: torch.randn(64, 6)


def conv(rank: int, groups: int = 1, bias: bool = True) -> tuple[nn.Module, Any]:
    kind, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    model = nn.Sequential(
        kind(3, 8, 3, padding=1),
        norm(8),
        nn.ReLU(),
        kind(8, 6, 3, padding=1, groups=groups, bias=bias),
        norm(6),
        nn.ReLU(),
        kind(6, 3, 1),
    )
    for t in (model[0].weight, model[0].bias):
        if groups == 1:
            twice(t)
        else:  # each group of four has its duplicates
            for i in range(groups):
                twice(t.data[8 // groups * i : 8 // groups * (i + 1)])
    return model, lambda: torch.randn(6, 3, *[6] * rank)


def transposed() -> tuple[nn.Module, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3, 2, padding=1, output_padding=1)
    )
    twice(model[0].weight, model[0].bias)
    return model, lambda: torch.randn(6, 3, 7, 7)


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.heads, self.size = 4, 3
        names = ["qkv"] if fused else ["q", "k", "v"]
        for name in names:
            self.add_module(name, nn.Linear(6, 36 if fused else 12))
        self.out = nn.Linear(12, 6)
        self.fused = fused
        for name in names:
            layer = getattr(self, name)
            for t in (layer.weight, layer.bias):
                twice(t.data.unflatten(0, (-1, 12)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.reshape(b, n, self.heads, self.size).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, self.heads * self.size))


class Native(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        for t in (self.attention.in_proj_weight, self.attention.in_proj_bias):
            torch.nn.init.normal_(t, 0, 0.3)
            twice(t.data.unflatten(0, (3, 12)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Rnn(nn.Module):
    """Duplicated hidden units of two layers: rows of all gates, and what reads them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 5)
        for name, t in self.cell.named_parameters():
            twice(t.data.unflatten(0, (-1, 8)), dim=1)
            if "hh" in name and t.ndim > 1:
                t.data *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


class Transposed(nn.Module):
    """Addmm with weights stored (in, out), as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.w2, self.b2 = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5))
        twice(self.w1, dim=1)
        twice(self.b1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.addmm(self.b2, torch.addmm(self.b1, flat, self.w1).relu(), self.w2)
        return y.reshape(x.shape[0], -1, 5)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(5, 8))
        twice(self.w1, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(
            "...f,ef->...e", torch.einsum("bnd,df->bnf", x, self.w1).tanh(), self.w2
        )


class Stream(nn.Module):
    """A residual stream whose second half repeats the first, in all that writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.up, self.down, self.head = nn.Linear(8, 7), nn.Linear(7, 8), nn.Linear(8, 5)
        twice(self.embed.weight, self.embed.bias, self.down.weight, self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(self.up(x).relu()))


def sequences() -> Tensor:
    return torch.randn(8, 7, 6)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], Any]] = {
    "mlp": (mlp, doubled(4)),
    "without_biases": (without_biases, doubled(4)),
    "combinations": (combinations, doubled(4)),
    "constants": (constants, doubled(4)),
    "conv1d": (lambda: conv(1), doubled(4)),
    "conv2d": (lambda: conv(2), doubled(4)),
    "conv2d_no_bias": (lambda: conv(2, bias=False), doubled(4)),
    "conv3d": (lambda: conv(3), doubled(4)),
    "conv_grouped": (lambda: conv(2, 2), doubled(2)),
    "conv_transposed": (transposed, doubled(4)),
    "attention_fused": (lambda: (Attention(True), sequences), doubled(2)),
    "attention_separate": (lambda: (Attention(False), sequences), doubled(2)),
    "attention_native": (lambda: (Native(), lambda: torch.randn(8, 7, 12)), doubled(2)),
    "lstm": (lambda: (Rnn("LSTM"), sequences), doubled(4)),
    "gru": (lambda: (Rnn("GRU"), sequences), doubled(4)),
    "addmm": (lambda: (Transposed(), sequences), doubled(4)),
    "einsum": (lambda: (Einsum(), sequences), doubled(4)),
    "stream": (lambda: (Stream(), sequences), doubled(4)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_stays_takes_over_what_repeats_it(name: str) -> None:
    torch.manual_seed(0)
    make, kept = CASES[name]
    model, inputs = make()
    model.eval()
    data = [inputs() for _ in range(4)]
    slim, done, plan = repaired(model, data, kept)
    assert plan.kept, "nothing was removed"
    plain = plan.apply(model, compensate=False)
    fresh = [inputs()]
    assert missed(model, plain, fresh) > 1e-3
    assert missed(model, slim, fresh) ** 0.5 < EXACT, done
    assert done.left == {}
    low, _, _ = repaired(model, data, kept, memory=1)
    for a, b in zip(slim.parameters(), low.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Least squares -----------------------------------------------------------------------------------


class Hidden(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def augmented(x: Tensor, y: Tensor, start: Tensor, ridge: float, bias: bool) -> tuple[Any, Any]:
    """(W, b) by torch.linalg.lstsq with rows that pull W towards where it was."""
    if ridge == float("inf"):
        return start, (y - x @ start.T).mean(0) if bias else torch.zeros(len(start)).double()
    spread = x - x.mean(0) if bias else x
    pull = (ridge * spread.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
    ones, zeros = torch.ones(len(x), 1).double(), torch.zeros(x.shape[1], 1).double()
    left = torch.cat([torch.cat([x, ones], 1), torch.cat([pull, zeros], 1)])
    if not bias:
        left = left[:, :-1]
    found = torch.linalg.lstsq(left, torch.cat([y, pull @ start.T]), driver="gelsd").solution
    return (found[:-1].T, found[-1]) if bias else (found.T, torch.zeros(len(start)).double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batches", [1, 3])
def test_weights_are_those_of_least_squares_and_the_ridge_of_two_folds(
    bias: bool, batches: int
) -> None:
    model, kept = Hidden(bias).eval(), [0, 2, 3, 7]
    data = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(batches)]
    slim, done, _ = repaired(model, data, {"up": kept})
    xs = [model.up(d).relu().detach().double() for d in data]
    ys = [x @ model.down.weight.double().T for x in xs]
    if bias:
        ys = [y + model.down.bias.double() for y in ys]
    xs, ys = [x[:, kept] for x in xs], [y.detach() for y in ys]
    if batches == 1:
        parts = [(xs[0][:4], ys[0][:4]), (xs[0][4:], ys[0][4:])]
    else:
        parts = [(torch.cat(xs[i::2]), torch.cat(ys[i::2])) for i in range(2)]
    start = model.down.weight[:, kept].detach().double()
    errors = []
    for ridge in RIDGES:
        total = 0.0
        for (x, y), (x2, y2) in (parts, parts[::-1]):
            w, b = augmented(x, y, start, ridge, bias)
            total += float((y2 - x2 @ w.T - b).square().sum())
        errors.append(total)
    [repair] = done.repairs
    assert repair.ridge == RIDGES[int(np.argmin(errors))]
    w, b = augmented(torch.cat(xs), torch.cat(ys), start, repair.ridge, bias)
    torch.testing.assert_close(slim.down.weight.detach().double(), w, rtol=1e-4, atol=1e-5)
    if bias:
        torch.testing.assert_close(slim.down.bias.detach().double(), b, rtol=1e-4, atol=1e-5)
    spread = sum(float((y - torch.cat(ys).mean(0)).square().sum()) for y in ys)
    assert repair.after == pytest.approx(min(errors) / spread, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize(("rows", "batches"), [(1, 1), (1, 2), (2, 1), (3, 3), (40, 2)], ids=str)
def test_little_data_dead_units_and_large_activations_give_finite_weights(
    scale: float, rows: int, batches: int
) -> None:
    model = Hidden(True).eval()
    with torch.no_grad():
        model.up.weight[3] = 0
        model.up.bias[3] = -1.0
        model.up.weight[4] = 0
        model.up.bias[4] = 2 * scale
    data = [scale * normal(rows, 6).roll(i, 1) for i in range(batches)]
    slim, _, plan = repaired(model, data, {"up": [0, 2, 3, 4]})
    assert all(bool(p.isfinite().all()) for p in slim.parameters())
    assert slim.down.weight.abs().max().item() < 10 * model.down.weight.abs().max().item()
    plain = plan.apply(model, compensate=False)
    assert missed(model, slim, data) <= 1.02 * missed(model, plain, data) + 1e-12


def test_one_vector_moves_the_bias_alone() -> None:
    x, w = torch.randn(1, 1, 3).double(), torch.randn(1, 2, 3).double()
    y = torch.randn(1, 1, 2).double()
    folds = Folds(1)
    folds.add(0, x, y)
    found = solve(folds.moments("", ALONE), w, torch.zeros(1, 2))
    assert torch.equal(found.weight, w)
    torch.testing.assert_close(found.bias[0], y[0, 0] - w[0] @ x[0, 0])


def test_constant_inputs_leave_their_weights() -> None:
    x = torch.randn(1, 50, 3)
    x[..., 1] = 0.1
    w, y = torch.randn(1, 2, 3), torch.randn(1, 50, 2)
    found = solve([Moments.of(x, y), Moments.of(x, y)], w, torch.zeros(1, 2))
    torch.testing.assert_close(found.weight[..., 1], w[..., 1].double(), rtol=1e-3, atol=1e-3)


# Batch norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_running_statistics_move_as_those_of_the_batches(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=bias), nn.BatchNorm2d(6), Last()
    ).eval()
    model[3].running_mean.normal_()
    model[3].running_var.uniform_(0.5, 2)
    model[3].num_batches_tracked.fill_(7)
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    slim, _, _ = repaired(model, data, {"0": [0, 1, 5], "2": [1, 2, 4]})
    assert int(slim[3].num_batches_tracked) == 7
    x = torch.cat(data)
    with torch.no_grad():
        before, after = model[:3](x)[:, [1, 2, 4]], slim[:3](x)
    shift = after.mean((0, 2, 3)) - before.mean((0, 2, 3))
    ratio = after.var((0, 2, 3), unbiased=False) / before.var((0, 2, 3), unbiased=False)
    at = [1, 2, 4]
    torch.testing.assert_close(slim[3].running_mean, model[3].running_mean[at] + shift)
    torch.testing.assert_close(
        slim[3].running_var, model[3].running_var[at] * ratio, rtol=1e-3, atol=1e-4
    )
    assert bias or float(shift.abs().max()) > 1e-3


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.relu().mean((2, 3)))


class SharedNorm(nn.Module):
    """One batch norm behind two layers cannot take a constant of either."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.a, self.b = nn.Linear(9, 4, bias=False), nn.Linear(9, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        return self.norm(self.a(x)) - self.norm(self.b(x))


def test_a_batch_norm_that_is_called_twice_stays() -> None:
    torch.manual_seed(0)
    model = SharedNorm().eval()
    slim, done, _ = repaired(model, [torch.randn(40, 6) for _ in range(2)], {"up": [0, 2, 3, 7]})
    assert torch.equal(slim.norm.running_mean, model.norm.running_mean)
    assert torch.equal(slim.norm.running_var, model.norm.running_var)
    assert [r.layer for r in done.repairs] == ["a", "b"]


# Every structure ---------------------------------------------------------------------------------

# Each layer is nearer to the dense one, the outputs are not.
WORSE = {
    "causal_decoder": "its head is tied to the embedding and cannot be solved",
}


@pytest.mark.parametrize("net", sampled(NETS, [*SAMPLE, *WORSE]))
def test_outputs_come_closer(net: Net) -> None:
    model, data = net.build(), data_of(net)
    analysis = depcut.analyze(model, data[0])
    kept = oracle.random_keep(analysis, np.random.default_rng(0))
    if not kept:
        pytest.skip("nothing can be removed")
    slim, done, plan = repaired(model, data, kept)
    assert slim.training == model.training
    assert all(bool(t.isfinite().all()) for x in data for t in oracle.outputs(slim, x))
    plain = plan.apply(model, compensate=False)
    allowed = 1.1 if net.name in WORSE else 1.02
    assert missed(model, slim, data) <= allowed * missed(model, plain, data) + 1e-10
    assert not torch.is_autocast_enabled("cpu")
    assert done.repairs or done.left


def test_what_is_shared_is_left_and_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.again, self.down = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.again(self.again(self.up(x).relu()).relu()))

    model = Twice().eval()
    slim, done, _ = repaired(model, [torch.randn(20, 6)] * 2, {"up": [0, 1, 5]})
    assert done.left == {"again": "again.weight is used more than once"}
    assert [r.layer for r in done.repairs] == ["down"]
    assert torch.equal(slim.again.weight, model.again.weight[[0, 1, 5]][:, [0, 1, 5]])


def test_buffers_that_the_model_writes_to_stay() -> None:
    class Counting(Hidden):
        def __init__(self) -> None:
            super().__init__(True)
            self.register_buffer("calls", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x) + 0 * self.calls

    model = Counting().eval()
    slim, _, plan = repaired(model, [torch.randn(20, 6)] * 3, {"up": [0, 1, 5]})
    assert torch.equal(slim.calls, plan.apply(model, compensate=False).calls)


# Modes, optimizers, precision --------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_an_optimizer_trains_on_and_modes_stay(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    model.train(training)
    model[1].eval()
    data = [torch.randn(20, 6) for _ in range(2)]
    slim, _, _ = repaired(model, data, {"0": [0, 1, 5]}, optimizer=optimizer)
    assert [m.training for m in slim.modules()] == [m.training for m in model.modules()]
    weight = slim[3].weight
    assert optimizer.state[weight]["exp_avg"].shape == weight.shape
    before = weight.detach().clone()
    optimizer.zero_grad()
    slim(data[0]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_kept(dtype: torch.dtype) -> None:
    model = Hidden(True).eval().to(dtype)
    data = [torch.randn(40, 6, dtype=dtype) for _ in range(2)]
    slim, _, plan = repaired(model, data, {"up": [0, 2, 3, 7]})
    assert {p.dtype for p in slim.parameters()} == {dtype}
    assert missed(model, slim, data) < missed(model, plan.apply(model, compensate=False), data)


# Mistakes ----------------------------------------------------------------------------------------


class Overflowing(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return self.down((100 * self.up(x)).exp()) * 0 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "the data is empty"),
        ({"data": [torch.randn(3, 7)]}, "shape (3, 7), the model was captured with"),
        ({"data": [torch.full((3, 6), float("nan"))]}, "18 of the 18 values of x are NaN"),
        ({"data": [torch.randn(3, 6)], "batches": 0}, "batches is 0"),
        ({"compensate": True}, "compensation needs data"),
        ({"compensate": "yes"}, "compensate is 'yes'"),
        ({"score": "obs"}, "criterion 'obs' needs data"),
        (
            {"data": [(torch.randn(3, 6), torch.zeros(3))], "loss": lambda o, _: o, "score": "obs"},
            "not a scalar tensor",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_mistakes_are_named_and_nothing_is_touched(options: Any, message: str) -> None:
    model = Hidden(True)
    before = oracle.snapshot(model)
    with pytest.raises(InputError) as caught:
        depcut.shrink(model, 0.5, torch.randn(3, 6), align=1, progress=False, **options)
    assert message in str(caught.value)
    assert caught.value.remedy
    oracle.assert_untouched(model, before)


@pytest.mark.parametrize("score", ["magnitude", "obs"])
def test_a_model_that_overflows_on_the_data_is_named(score: str) -> None:
    model = Overflowing(True)
    before = oracle.snapshot(model)
    with pytest.raises(InputError, match=r"(?s)NaN or infinite for item 1.*exp|down"):
        depcut.shrink(
            model,
            0.5,
            torch.zeros(3, 6),
            data=[torch.zeros(3, 6), 1e3 * torch.ones(3, 6)],
            score=score,
            align=1,
            progress=False,
        )
    oracle.assert_untouched(model, before)
