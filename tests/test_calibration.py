"""Calibration data: every mistake in it is found, named, and found before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nets import NETS, normal
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils.data import DataLoader, TensorDataset

import depcut
from depcut.calibration.data import Calibration, calibrate
from depcut.calibration.gradients import curvatures, gradients, trainable
from depcut.errors import InputError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x).relu()))


MODEL = Small()
PROGRAM = depcut.analyze(MODEL, normal(2, 6)).program
TARGET = torch.tensor([0, 3])


def read(data: Any, model: nn.Module = MODEL, program: Any = PROGRAM, **options: Any) -> Any:
    return calibrate(program, model, data, progress=False, **options)


def refused(data: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(data, **options)
    assert caught.value.remedy
    assert caught.value.where
    return str(caught.value)


# What is read ------------------------------------------------------------------------------------


def test_a_loader_of_pairs_is_read_with_and_without_a_loss() -> None:
    x, y = normal(7, 6), torch.arange(7) % 4
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for loss in (None, F.cross_entropy):
        found = read(loader, loss=loss)
        assert [b.rows for b in found.batches] == [3, 3, 1]
        assert found.rows == 7
        assert torch.equal(torch.cat([b.args[0] for b in found.batches]), x)
        assert torch.equal(torch.cat([b.target for b in found.batches]), y)


def test_a_loader_of_lists_of_one_tensor_is_read() -> None:
    found = read(DataLoader(TensorDataset(normal(5, 6)), batch_size=2))
    assert [b.rows for b in found.batches] == [2, 2, 1]


def test_a_generator_is_asked_for_no_more_than_is_wanted() -> None:
    asked = []

    def endless() -> Iterator[Tensor]:
        while True:
            asked.append(len(asked))
            yield normal(2, 6)

    assert len(read(endless(), batches=3).batches) == 3
    assert asked == [0, 1, 2]


def test_two_inputs_are_inputs_without_a_loss_and_a_pair_with_one() -> None:
    net = NETS["masked_inputs"]
    model = net.build()
    program = depcut.analyze(model, net.inputs(2)).program
    assert len(read([net.inputs(3)], model, program).batches[0].args) == 2
    item = (net.inputs(3), torch.zeros(3, dtype=torch.int64))
    batch = read([item], model, program, loss=F.cross_entropy).batches[0]
    assert len(batch.args) == 2
    assert batch.target.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match=r"(?s)captured with x, mask, this has x.*item 0"):
        read([net.inputs(3)], model, program, loss=F.cross_entropy)


def test_items_that_are_dicts_may_hold_more_and_in_any_order() -> None:
    net = NETS["dict_inputs"]
    model, given = net.build(), net.inputs(2)
    assert isinstance(given, dict)
    program = depcut.analyze(model, given).program
    item = {"labels": torch.tensor([1, 2]), **dict(reversed(given.items()))}
    seen = []

    def loss(output: Any, whole: Any) -> Tensor:
        seen.append(whole["labels"].tolist())
        return F.cross_entropy(output["label"], whole["labels"])

    [batch] = read([item], model, program, loss=loss).batches
    assert list(batch.kwargs) == list(given)
    assert seen == [[1, 2]]


def test_keywords_reach_a_model_that_was_captured_with_positions() -> None:
    [batch] = read([{"x": normal(3, 6), "number": 1}]).batches
    assert torch.equal(batch.args[0], normal(3, 6))
    assert batch.kwargs == {}


def test_a_dimension_that_varies_by_itself_is_no_batch() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.last(self.first(x)) + table.sum()

    model = Places()
    program = depcut.analyze(model, (normal(2, 6), normal(5, 3))).program
    [batch] = read([(normal(4, 6), normal(5, 3))], model, program).batches
    assert batch.rows == 4


def test_batches_are_copies_of_the_users_tensors() -> None:
    x = normal(2, 6)
    found = read([(x, TARGET)])
    args, _ = found.arguments(found.batches[0])
    args[0].zero_()
    assert torch.equal(x, normal(2, 6))


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "empty", [[], iter(()), DataLoader([])], ids=["list", "iterator", "loader"]
)
def test_no_data_is_refused(empty: Any) -> None:
    assert "the data is empty" in refused(empty)


@pytest.mark.parametrize("data", [normal(2, 6), {"x": normal(2, 6)}, "loader", 3])
def test_what_is_no_iterable_of_items_is_refused(data: Any) -> None:
    message = refused(data)
    assert f"data is a {type(data).__name__}" in message
    assert "[x], not x" in message


def test_wrong_sizes_name_the_item_and_both_shapes() -> None:
    message = refused([normal(2, 6), normal(2, 7)])
    assert "shape (2, 7), the model was captured with (2, 6)" in message
    assert "data, item 1" in message
    assert "the model itself raises" in message
    assert "pad or cut" in message


def test_wrong_types_say_how_to_convert() -> None:
    message = refused([normal(2, 6).double()])
    assert "x is float64, the model was captured with float32" in message
    assert ".to(torch.float32)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted(value: float) -> None:
    x = normal(2, 6)
    x[0, :3] = value
    assert "3 of the 12 values of x are NaN or infinite" in refused([x])


def test_another_structure_is_shown_beside_the_captured_one() -> None:
    message = refused([[normal(2, 6), normal(2, 6), normal(2, 6)]])
    assert "the model does not take it" in message or "structure" in message


@pytest.mark.parametrize("batches", [0, -1, 2.0, True])
def test_batches_is_a_positive_integer(batches: Any) -> None:
    assert f"batches is {batches!r}" in refused([normal(2, 6)], batches=batches)


# Losses ------------------------------------------------------------------------------------------


def failing(output: Any, target: Any) -> Any:
    raise KeyError("labels")


def test_a_loss_that_fails_is_quoted() -> None:
    message = refused([(normal(2, 6), TARGET)], loss=failing)
    assert "it failed: KeyError: 'labels'" in message
    assert "loss=failing" in message
    assert "(output of the model, target of the item)" in message


def test_a_loss_that_is_no_function_is_refused() -> None:
    assert "loss is a str, not a function" in refused([normal(2, 6)], loss="cross_entropy")


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda o, _: o, "(2, 4)"),
        (lambda o, _: float(o.sum()), "float"),
        (lambda o, _: None, "NoneType"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss: Any, got: str) -> None:
    message = refused([(normal(2, 6), TARGET)], loss=loss)
    assert f"it returned {got}, not a scalar tensor" in message
    assert "reduction='mean'" in message


def test_a_loss_that_is_not_finite_is_refused() -> None:
    message = refused([(normal(2, 6), TARGET)], loss=lambda o, _: o.sum() * float("nan"))
    assert "it returned nan" in message


@pytest.mark.parametrize("loss", [lambda o, _: o.detach().sum(), lambda o, _: 0 * torch.rand(())])
def test_a_loss_that_does_not_depend_on_the_weights_is_refused(loss: Any) -> None:
    found = read([(normal(2, 6), TARGET)], loss=loss)
    with (
        pytest.raises(InputError, match="does not depend on the model's weights"),
        trainable(MODEL) as live,
    ):
        list(gradients(live, found))


# Gradients ---------------------------------------------------------------------------------------


def pairs(batches: int = 2) -> Calibration:
    items = [(normal(3 + i, 6), torch.arange(3 + i) % 4) for i in range(batches)]
    found: Calibration = read(items, loss=F.cross_entropy)
    return found


def test_gradients_are_those_of_autograd() -> None:
    found = pairs()
    with trainable(MODEL) as live:
        ours = list(gradients(live, found))
    model = Small().eval()
    assert ours
    for batch, gradient in zip(found.batches, ours, strict=True):
        model.zero_grad()
        F.cross_entropy(model(*batch.args), batch.target).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradient[name], p.grad)


@pytest.mark.parametrize("of_gradient", [True, False])
def test_curvatures_are_hessian_vector_products(of_gradient: bool) -> None:
    found = pairs(1)
    [batch] = found.batches
    with trainable(MODEL) as live:
        [gradient] = gradients(live, found)
        [curved] = curvatures(live, found, of_gradient=of_gradient)
    names = dict(MODEL.named_parameters())
    sizes = [p.numel() for p in names.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        held = {n: q.view_as(p) for (n, p), q in zip(names.items(), parts, strict=True)}
        output = torch.func.functional_call(Small().eval(), held, batch.args)
        return F.cross_entropy(output, batch.target)

    flat = torch.cat([p.detach().flatten() for p in names.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    vector = torch.cat([gradient[n].flatten() for n in names]) if of_gradient else flat
    got = torch.cat([curved[n].flatten() for n in names])
    torch.testing.assert_close(got, hessian @ vector, rtol=1e-4, atol=1e-6)


class Gated(nn.Module):
    """Its activation has no second derivative in torch; between its bends it is quadratic."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.hardsigmoid(self.first(x)))


class Written(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) / 6 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("of_gradient", [True, False])
def test_where_torch_has_no_second_derivative_a_difference_stands_in(of_gradient: bool) -> None:
    x, y = normal(5, 6), torch.arange(5) % 4
    found = []
    for model in (Gated(), Written()):
        program = depcut.analyze(model, x).program
        data = read([(x, y)], model, program, loss=F.cross_entropy)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with trainable(model) as live:
            found += curvatures(live, data, of_gradient=of_gradient)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for name, exact in found[1].items():
        scale = float(exact.abs().max())
        torch.testing.assert_close(found[0][name], exact, rtol=1e-2, atol=5e-3 * scale)


def test_gradients_modes_and_flags_are_as_before_even_after_an_error() -> None:
    model = Small()
    model.train()
    model.last.eval()
    model.first.weight.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    calls, running = [], []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(any(m.training for live in running for m in live.modules()))
        assert [m.training for m in model.modules()] == modes, "the model is served meanwhile"
        if len(calls) > 2:
            raise ValueError("late")
        return F.cross_entropy(output, target)

    data = read([(normal(2, 6), TARGET)] * 3, model, loss=loss)
    with trainable(model) as live:
        running.append(live)
        assert all(p.requires_grad for p in live.parameters())
        with pytest.raises(InputError, match="it failed: ValueError: late"):
            list(gradients(live, data))
    assert [n for n, _ in live.named_parameters()] == list(state)
    assert calls == [False] * 3
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))
    assert model.first.weight.grad is None


def test_a_progress_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    data = calibrate(PROGRAM, MODEL, [(normal(2, 6), TARGET)], loss=F.cross_entropy, progress=True)
    with trainable(MODEL) as live:
        list(gradients(live, data))
    assert re.sub(r"\s", "", capsys.readouterr().out) == ""
