"""Compiled and data-parallel models are taken for the model that they wrap."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import depcut
from depcut import training


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def compiled(module: Any) -> Any:
    """Without a compiler: what it is wrapped in is the same."""
    return torch.compile(module, backend="eager")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    file = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "twice": lambda net: compiled(nn.DataParallel(net)),
}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.sweep] * (n != "DataParallel")) for n in WRAPPERS]
)
@pytest.mark.usefixtures("process_group")
def test_a_wrapped_model_gives_a_plain_one(name: str) -> None:
    net = Net().eval()
    wrapped = WRAPPERS[name](net)
    plan = depcut.analyze(wrapped, X).plan(0.5)
    loaded = depcut.Plan.of(plan, None, None)  # type: ignore[arg-type]  # as one from a file
    for slim in (
        depcut.shrink(wrapped, 0.5, X, data=None),
        plan.apply(wrapped),
        loaded.apply(wrapped, X),
    ):
        assert type(slim) is Net
        assert slim.body[0].out_features == 8
        (note,) = depcut.report(slim).notes
        assert "was wrapped by" in note
    assert not depcut.report(plan.apply(net)).notes


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:nothing was removed")
def test_every_public_function_takes_a_compiled_model(tmp_path: Path) -> None:
    net = Net().eval()
    wrapped = compiled(net)
    slim = depcut.shrink(wrapped, 0.5, X)
    small = compiled(slim)
    assert depcut.report(small) == depcut.report(slim)
    assert type(depcut.compact(wrapped, X)) is Net
    assert depcut.export(small, tmp_path / "slim.onnx", X).bytes
    figures = depcut.compare(wrapped, small, X, runtime=None)
    assert figures.slim.macs < figures.dense.macs
    plan = depcut.analyze(wrapped, X).plan(0.5)
    assert plan.bind(wrapped).model is net
    assert 0 < training.relative_distance(wrapped, plan) < 1
    assert training.output_distance(wrapped, small, [X]) > 0
    assert type(training.fresh(wrapped, plan)) is Net
    assert type(training.iterate(wrapped, 0.5, X).model) is Net
    gradual = training.Gradual(wrapped, 0.5, X, 0, 1, 1)
    assert gradual.model is net
    assert training.Distillation(wrapped, small, plan).slim is slim


def test_a_module_compiled_in_place_gives_one_that_is_not() -> None:
    net = Net().eval()
    net.compile(backend="eager")
    net.body.compile(backend="eager")
    slim = depcut.shrink(net, 0.5, X)
    for module in (slim, slim.body):
        assert "_compiled_call_impl" not in vars(module)
    assert "_compiled_call_impl" in vars(net)
    again = pickle.loads(pickle.dumps(slim))  # noqa: S301  of this very process
    assert torch.equal(again(X), slim(X))


@pytest.mark.sweep
def test_a_compiled_part_stays_compiled_and_runs_the_smaller_weights() -> None:
    net = Net().eval()
    net.body = compiled(net.body)
    slim = depcut.shrink(net, 0.5, X)
    assert list(slim.state_dict()) == list(net.state_dict())
    before = slim(X)
    with torch.no_grad():
        slim.get_parameter("body._orig_mod.0.weight").zero_()
    assert not torch.equal(slim(X), before)
    again = copy.deepcopy(slim)
    assert torch.equal(again(X), slim(X))


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_shrunk_as_the_plain_one() -> None:
    from torch.distributed.tensor import DTensor, init_device_mesh

    plain = Net().eval()
    net = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    weight = DTensor.from_local(net.head.weight.detach(), mesh)
    net.head.weight = nn.Parameter(weight)
    slim, expected = (depcut.shrink(m, 0.5, X, align=1) for m in (net, plain))
    assert isinstance(net.head.weight, DTensor)
    assert type(slim.head.weight) is nn.Parameter
    assert slim.head.weight.shape != plain.head.weight.shape
    assert torch.equal(slim(X), expected(X))
