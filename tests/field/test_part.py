"""A model that cannot be captured as a whole is made smaller by a part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import depcut


class Detector(nn.Module):
    """Takes a list of images, and keeps boxes by their scores: how many depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 8, 1),
        )
        self.head = nn.Conv2d(8, 5, 1)
        self.calls = 0
        self.register_forward_hook(lambda module, _, __: vars(module).update(calls=1))

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = []
        for row in self.head(self.backbone(torch.stack(images))).flatten(2).transpose(1, 2):
            kept = row[row[:, 0] > 0] if row[:, 0].max() > 0 else row[:1]
            found.append({"boxes": kept[:, 1:], "n": torch.tensor(len(kept))})
        return found


def detector(kind: type[Detector] = Detector) -> Detector:
    torch.manual_seed(0)
    return kind().eval()


def images(seed: int = 0) -> tuple[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return ([torch.randn(3, 8, 8, generator=generator) for _ in range(2)],)


def test_a_part_alone_becomes_smaller_in_the_whole() -> None:
    net, inputs = detector(), images()
    before = [t.clone() for t in net.state_dict().values()]
    slim = depcut.shrink(net, 0.4, inputs, data=None, part="backbone", ignore=("backbone.3",))
    assert type(slim) is Detector
    assert slim.backbone[0].out_channels < 16
    assert slim.backbone[3].out_channels == 32
    assert slim.backbone[5].out_channels == 8
    assert slim.head.out_channels == 5
    assert list(slim.state_dict()) == list(net.state_dict())
    assert all(map(torch.equal, before, net.state_dict().values()))
    assert slim(*inputs)[0]["boxes"].shape[1] == 4
    assert slim.calls == 1  # a hook of the whole's own, bound to the copy
    assert net.calls == 0
    report = depcut.report(slim)
    (note,) = report.notes
    assert "'backbone' alone was captured" in note
    assert not report.unreached
    assert report.params[0] == sum(p.numel() for p in net.parameters())


def test_the_refusal_of_the_whole_proposes_a_part() -> None:
    with pytest.raises(depcut.CaptureError, match=r'part="backbone" \(\d\d% of the parameters'):
        depcut.analyze(detector(), images())


@pytest.mark.sweep
def test_a_plan_of_a_part_is_saved_and_applied(tmp_path: Path) -> None:
    net, inputs = detector(), images()
    plan = depcut.analyze(net, inputs, part="backbone").plan(0.5)
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    assert loaded.part == plan.part == "backbone"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    direct = plan.apply(net, optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in direct.parameters()
    ]
    for again in (loaded.apply(net, inputs), loaded.apply(net), loaded.bind(net).apply(net)):
        assert torch.equal(again(*inputs)[0]["boxes"], direct(*inputs)[0]["boxes"])
    assert "was not run, for want of inputs" in depcut.report(loaded.apply(net)).notes[1]


def test_a_plan_of_a_part_is_judged_in_the_whole(tmp_path: Path) -> None:
    net, inputs = detector(), images()
    plan = depcut.analyze(net, inputs, part="backbone").plan(0.5)
    slim, dense = plan.apply(net, compensate=False), net(*inputs)[0]["boxes"]
    plan.save(tmp_path / "plan.json")
    for judged in (plan, depcut.Plan.load(tmp_path / "plan.json")):
        with judged.masked(net):
            torch.testing.assert_close(net(*inputs)[0]["boxes"], slim(*inputs)[0]["boxes"])
        assert torch.equal(net(*inputs)[0]["boxes"], dense)


@pytest.mark.sweep
def test_data_of_the_whole_repairs_the_part() -> None:
    net = detector()
    data = [images(seed) for seed in range(3)]
    slim = depcut.shrink(net, 0.5, data=data, part="backbone")
    repaired = depcut.report(slim).compensation
    assert repaired is not None
    assert {r.layer for r in repaired.repairs} >= {"backbone.5"}
    with pytest.raises(depcut.InputError, match="the loss is of the whole model"):
        depcut.shrink(net, 0.5, data=data, loss=lambda out, _: out[0]["boxes"].sum(), part="head")


@pytest.mark.sweep
def test_dead_units_of_a_part_go() -> None:
    net, inputs = detector(), images()
    with torch.no_grad():
        net.backbone[3].weight[4:12] = 0
        net.backbone[3].bias[4:12] = -1
    small = depcut.compact(net, inputs, part="backbone")
    assert small.backbone[3].out_channels == 24
    torch.testing.assert_close(small(*inputs)[0]["boxes"], net(*inputs)[0]["boxes"])


class Peeking(Detector):
    """Also reads what is inside of the backbone."""

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = super().forward(images)
        found[0]["boxes"] = found[0]["boxes"] + self.backbone[0].weight.sum()
        return found


class Tied(Detector):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.zeros(5, 8, 1, 1))
        self.again = nn.Conv2d(16, 32, 3)
        self.again.weight = self.backbone[3].weight


class Broken(Detector):
    """Its own code fails behind the part, as compiled operators that are missing do."""

    def forward(self, images: list[torch.Tensor]) -> Any:
        super().forward(images)
        raise NotImplementedError("no such operator")


def test_what_reaches_into_the_part_is_seen() -> None:
    with pytest.raises(depcut.VerificationError, match="does not compute what it should"):
        depcut.shrink(detector(Peeking), 0.5, images(), part="backbone")
    with pytest.raises(depcut.InputError, match=r"backbone\.3\.weight \(again\.weight\)"):
        depcut.analyze(detector(Tied), images(), part="backbone")


@pytest.mark.sweep
def test_a_whole_that_fails_behind_the_part_is_not_compared_and_that_is_told() -> None:
    slim = depcut.shrink(detector(Broken), 0.5, images(), part="backbone")
    assert "NotImplementedError: no such operator" in depcut.report(slim).notes[1]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("nothing", "the model has no part 'nothing'"),
        ("", "the model has no part ''"),
        (("backbone", "head"), "part is a tuple"),
    ],
)
def test_what_is_no_part_is_refused(part: Any, message: str) -> None:
    with pytest.raises(depcut.InputError, match=message):
        depcut.analyze(detector(), images(), part=part)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 8), nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.last(self.used(x).relu() * scale)


@pytest.mark.sweep
def test_a_part_that_is_called_several_times_and_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Gated()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.inner(x, scale=2.0)
            if first.sum() > 0:
                first = first + 1
            return first + self.inner(x[:, :1].expand(-1, 4), scale=0.5).sum()

    net = Net().eval()
    x = torch.randn(3, 4)
    analysis = depcut.analyze(net, x, part="inner")
    assert len(analysis.program.examples) == 2  # two values of scale
    slim = analysis.plan(0.5).apply(net)
    assert slim.inner.used.out_features == 4
    assert depcut.report(slim).unreached == ("inner.unused",)
    with pytest.raises(depcut.InputError, match=r"does not run 'inner\.unused'"):
        depcut.analyze(net, x, part="inner.unused")
