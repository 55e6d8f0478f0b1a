"""Calibration data made from the model itself: when it is, what becomes of it, what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import depcut
from depcut.calibration import self_made as making
from depcut.calibration.self_made import self_made
from depcut.errors import InputError
from depcut.shrinking.smaller import _seen
from depcut.synthetic.fresh import fresh, standing_out
from depcut.synthetic.subject import Made, Subject

Asked = list[Subject]


class Net(nn.Module):
    """Two hidden layers; trained, its weights are of low rank and noise."""

    def __init__(self, *, trained: bool = True) -> None:
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.up, self.mid, self.head):
            out, into = layer.weight.shape
            noise = torch.randn(out, into, generator=generator)
            low = torch.randn(out, 2, generator=generator) @ torch.randn(
                2, into, generator=generator
            )
            layer.weight.data = 0.1 * (noise + (4 * low if trained else 0 * low))
            layer.bias.data = torch.randn(out, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.up(x).relu()).relu())


X = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A recipe for any model; whom it was asked for."""
    subjects: Asked = []

    def recipe(subject: Subject) -> Made:
        subjects.append(subject)
        generator = subject.generator()
        items = tuple([torch.randn(n, 12, generator=generator)] for n in subject.chunks())
        return Made(items, "noise of a test", "off by 0.1")

    monkeypatch.setattr(making, "make", recipe)
    return subjects


def notes(model: nn.Module) -> str:
    return " | ".join(depcut.report(model).notes)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_no_data_means_that_it_is_made(asked: Asked) -> None:
    slim = depcut.shrink(Net(), 0.5, X, align=1)
    report = depcut.report(slim)
    assert len(asked) == 1
    assert report.compensation is not None
    assert "no data was given; 160 examples were made in" in notes(slim)
    assert "noise of a test; off by 0.1" in notes(slim)
    assert report.settings["examples"] == 128  # a fifth is held out
    assert report.settings["score"] == "obs"


def test_what_is_made_is_used_as_data_is(asked: Asked) -> None:
    slim = depcut.shrink(Net(), 0.5, X, align=1)
    given = depcut.shrink(Net(), 0.5, X, data=_drawn(asked[0])[:-1], align=1)
    assert same(slim, given)


def _drawn(subject: Subject) -> list[Tensor]:
    generator = subject.generator()
    return [torch.randn(n, 12, generator=generator) for n in subject.chunks()]


def test_none_means_weights_alone(asked: Asked) -> None:
    slim = depcut.shrink(Net(), 0.5, X, data=None, align=1)
    report = depcut.report(slim)
    assert not asked
    assert report.compensation is None
    assert report.settings["score"] == "magnitude"
    assert not report.notes


@pytest.mark.parametrize(
    "options", [{"score": "synflow"}, {"score": "magnitude", "compensate": False}]
)
def test_it_is_not_made_where_nothing_reads_it(asked: Asked, options: dict[str, Any]) -> None:
    slim = depcut.shrink(Net(), 0.5, X, **options)
    assert not asked
    assert not depcut.report(slim).notes


def test_drawn_weights_are_not_asked(asked: Asked) -> None:
    net = Net(trained=False)
    slim = depcut.shrink(net, 0.5, X, align=1)
    assert not asked
    assert "the weights look as they were drawn" in notes(slim)
    assert same(slim, depcut.shrink(net, 0.5, X, data=None, align=1))


def test_the_plain_model_where_it_is_closer(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([0.5, 0.25])
    monkeypatch.setattr("depcut.shrinking.smaller._change", lambda *_args: next(told))
    net = Net()
    slim = depcut.shrink(net, 0.5, X, align=1)
    assert len(asked) == 1
    assert same(slim, depcut.shrink(net, 0.5, X, data=None, align=1))
    assert "the repaired model was further from the dense one (0.5" in notes(slim)


def test_on_what_is_held_out_the_repaired_model_is_closer(asked: Asked) -> None:
    """Judged by this test's own distance, on inputs that the recipe drew and kept back."""
    net = Net()
    slim = depcut.shrink(net, 0.5, X, align=1)
    plain = depcut.shrink(net, 0.5, X, data=None, align=1)
    held_out = _drawn(asked[0])[-1]
    with torch.no_grad():
        near, far = ((other(held_out) - net(held_out)).norm() for other in (slim, plain))
    assert near < far


def test_what_no_softmax_sees_is_no_distance() -> None:
    logits = torch.randn(4, 5)
    assert torch.allclose(_seen(logits + 100 * torch.randn(4, 1)), _seen(logits), atol=1e-4)
    column = torch.randn(4, 1)
    assert torch.equal(_seen(column), column)


@pytest.mark.usefixtures("asked")
def test_the_optimizer_trains_what_is_returned() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    slim = depcut.shrink(net, 0.5, X, optimizer=optimizer, align=1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in slim.parameters()}
    assert "160 examples were made" in notes(slim)


def test_a_recipe_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_subject: Subject) -> Made:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(making, "make", broken)
    net = Net()
    slim = depcut.shrink(net, 0.5, X, align=1)
    assert "inputs could not be made from the model: RuntimeError: no such luck" in notes(slim)
    assert same(slim, depcut.shrink(net, 0.5, X, data=None, align=1))


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "make", lambda _subject: None)
    assert "no way is known to make inputs" in notes(depcut.shrink(Net(), 0.5, X))


def test_a_plan_and_its_application_take_what_is_made_once(asked: Asked) -> None:
    net = Net()
    analysis = depcut.analyze(net, X)
    calibration = analysis.calibrate("auto")
    assert "noise of a test" in str(calibration)
    plan = analysis.plan(0.5, data=calibration, align=1)
    slim = plan.apply(net, data=calibration)
    assert len(asked) == 1
    assert same(slim, depcut.shrink(net, 0.5, X, align=1))
    assert "noise of a test" in notes(slim)
    assert same(plan.apply(net, data="auto"), slim)


def test_other_texts_are_refused() -> None:
    with pytest.raises(InputError, match=r"data is 'outo'.*") as caught:
        depcut.shrink(Net(), 0.5, X, data="outo")
    assert '"auto" for inputs made from the model itself' in str(caught.value)


def test_a_loss_has_nothing_to_be_taken_of(asked: Asked) -> None:
    with pytest.raises(InputError, match="no data to take it of"):
        depcut.shrink(Net(), 0.5, X, loss=nn.functional.cross_entropy)
    with pytest.raises(InputError, match="needs data and a loss"):
        depcut.shrink(Net(), 0.5, X, score="taylor")
    assert not asked


def test_costly_models_get_fewer_examples(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_MACS", 40 * depcut.analyze(Net(), X).macs)
    made = self_made(depcut.analyze(Net(), X).coupling, Net())
    assert asked[0].examples == 40
    assert made.calibration is not None
    assert made.calibration.rows == 30
    assert [len(leaves[0]) for leaves in made.held_out] == [10]


def test_independent_entries_do_not_stand_out() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4), (9, 200), (64, 64), (300, 27)]
    drawn = [torch.randn(*s, generator=generator) for s in shapes for _ in range(50)]
    drawn += [torch.rand(*s, generator=generator) - 0.5 for s in shapes for _ in range(50)]
    assert max(map(standing_out, drawn)) < 4
    assert standing_out(torch.zeros(8, 8)) == float("-inf")
    one = torch.ones(64, 1) @ torch.randn(1, 64, generator=generator)
    assert standing_out(torch.randn(64, 64, generator=generator) + one) > 50


def test_units_that_were_masked_or_scaled_do_not_stand_out() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    masked, scaled = weight.clone(), weight.clone()
    masked[::2] = 0
    scaled[::2] *= 30
    assert standing_out(masked) < 4
    assert standing_out(scaled) < 4


def test_kernels_that_are_a_little_smooth_stand_out() -> None:
    """As those of a convolution that was trained for a short time; its matrix shows nothing."""
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    program = depcut.analyze(net, torch.randn(2, 16, 9, 9)).program
    assert fresh(program, net)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight += 0.3 * layer.weight.mean((2, 3), keepdim=True)
            layer.weight[...] += 0.5 * layer.weight.roll(1, 3)
    assert not fresh(program, net)


def test_tables_that_are_set_are_no_sign_of_training() -> None:
    net = Net(trained=False)
    program = depcut.analyze(net, X).program
    with torch.no_grad():
        net.mid.weight[:] = torch.arange(1.0, 33.0)
    assert fresh(program, net)


@pytest.mark.sweep
@pytest.mark.usefixtures("zoo_libraries")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(zoo.ZOO)[::6])
def test_architectures_as_their_libraries_draw_them_are_fresh(name: str) -> None:
    model = zoo.build(name)
    program = depcut.analyze(model, zoo.ZOO[name].inputs(2)).program
    assert fresh(program, model)
