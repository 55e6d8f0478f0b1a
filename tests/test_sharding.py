"""What fully_shard has sharded: the smaller model is sharded alike, other calls are refused.

All in one process, over a group of one; `test_processes.py` has the same in two.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard

import depcut
from depcut import training
from depcut.apply.sharding import require_even, shard_alike
from depcut.errors import DepcutError, InputError
from depcut.support.fsdp_private import Placed, Sharding
from depcut.support.mapped import MappedTensors
from depcut.support.processes import Processes
from depcut.support.sharded import sharding_of

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def net() -> Any:
    torch.manual_seed(0)
    layers = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    return nn.Sequential(*layers).eval()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(X).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_the_smaller_model_is_sharded_as_the_dense_one_and_trains_on() -> None:
    model, plain = net(), net()
    ignored = {model[2].bias}
    fully_shard(model[0], reshard_after_forward=False, mp_policy=MixedPrecisionPolicy())
    fully_shard(model, ignored_params=ignored, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        step(m, optimizer)
    model(X)  # the root's parameters stay gathered after it
    sharding = sharding_of(model)
    assert sharding is not None
    slim, want = (
        depcut.shrink(m, 0.4, X, align=1, optimizer=optimizer)
        for m, optimizer in zip((model, plain), optimizers, strict=True)
    )
    ours = sharding_of(slim)
    assert ours is not None
    assert ours.units == sharding.units
    assert [u.modules for u in ours.units] == [("0",), ("",)]
    assert ours.units[0].arguments["reshard_after_forward"] is False
    assert [*ours.ignored] == ["2.bias"]
    placements = {name: each.placement for name, each in ours.placed.items()}
    assert placements == {name: each.placement for name, each in sharding.placed.items()}
    assert placements["2.weight"] == Shard(1)
    moments = optimizers[0].state[slim.get_parameter("2.weight")]["exp_avg"]
    assert moments.placements == (Shard(1),)
    assert "sharded by fully_shard" in " ".join(depcut.report(slim).notes)
    for _ in range(3):
        assert step(slim, optimizers[0]) == pytest.approx(step(want, optimizers[1]), rel=1e-5)


def test_a_model_sharded_and_replicated_is_stored_as_a_plain_one(tmp_path: Path) -> None:
    model, mesh = net(), init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
    offload = CPUOffloadPolicy(pin_memory=False)
    fully_shard([model[0], model[2]], mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh)
    slim = depcut.shrink(model, 0.4, X, align=1)
    assert sharding_of(slim).units == sharding_of(model).units
    assert slim[0].weight.placements == (Replicate(), Shard(0))
    depcut.save(slim, tmp_path / "slim")
    back = depcut.load(tmp_path / "slim", net)
    assert type(back) is nn.Sequential
    assert torch.equal(back(X), slim(X))


def test_modules_that_a_generated_one_does_not_run_are_sharded_with_it() -> None:
    dense = nn.Sequential(net(), net())
    for module in (dense[0][0], dense[0][2], dense[1][0], dense):
        fully_shard(module)
    sharding = sharding_of(dense)
    assert sharding is not None
    slim = nn.Sequential(net(), net())
    shard_alike(slim, sharding, (), ["0"])
    ours = sharding_of(slim)
    assert ours is not None
    assert [u.modules for u in ours.units] == [("1.0",), ("0",), ("",)]


def test_sizes_that_cannot_be_sharded_are_refused_with_the_multiple() -> None:
    placed = Placed(nn.Parameter(torch.zeros(1)), Shard(1), 2, Shard(1))
    sharding = Sharding((), {"0.weight": placed}, {})
    with pytest.raises(InputError, match="dimension 1 of 11 is sharded over 2") as caught:
        require_even(nn.Sequential(nn.Linear(11, 3)), sharding)
    assert "align=2" in caught.value.remedy


def test_tensor_parallelism_below_is_refused_before_the_work() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(net(), mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(InputError, match="tensor parallelism") as caught:
        depcut.shrink(model, 0.4, X, align=1)
    assert caught.value.where in ("0.weight", "0.bias")
    assert "before it is sharded" in caught.value.remedy


@dataclass(frozen=True)
class Second(Processes):
    """The second of two processes, whose first one says what it is told to."""

    folder: Any = None

    def exchanged(self, label: str, value: Any = None) -> list[Any]:
        return [self.folder if label == "folders" else value, value]


@pytest.mark.parametrize("seen", [True, False])
def test_processes_of_a_host_share_one_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = MappedTensors(Second(0, 2, folder=["elsewhere", "", ""]))
    (folder,) = tmp_path.iterdir()
    token = (folder / "here").read_text() if seen else "of another container"
    second = MappedTensors(Second(1, 2, folder=[socket.gethostname(), str(folder), token]))
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    held = first.put(ones)
    theirs = second.put(zeros)
    for files in (first, second):
        files.close()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(held, ones)
    assert torch.equal(theirs, ones if seen else zeros)


class Hollow(FullyShardedDataParallel):
    """The older wrapper, which needs an accelerator, as far as its class goes."""

    training_state = None

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.inner = module

    def __getattr__(self, name: str) -> Any:
        return nn.Module.__getattr__(self, name)


def squared(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output.square().mean()


# Those that run or change the model itself: they have no use for a plain one in its place.
CALLS: dict[str, Callable[[nn.Module, depcut.Plan], Any]] = {
    "retrain": lambda m, _: training.retrain(m, [(X, X)], loss=squared, epochs=1),
    "Gradual": lambda m, _: training.Gradual(m, 0.4, X, start=0, end=2, every=1),
    "iterate": lambda m, _: training.iterate(m, 0.4, X),
    "fresh": training.fresh,
    "Snapshots": lambda m, _: training.Snapshots((0,)).take(m, 0),
    "GroupLasso": lambda m, _: training.GroupLasso(depcut.analyze(m, X), 0.1),
    "GrowingRegularization": lambda m, plan: training.GrowingRegularization(
        depcut.analyze(m, X), plan
    ),
    "Distillation": lambda m, plan: training.Distillation(m, m, plan),
    "relative_distance": training.relative_distance,
    "output_distance": lambda m, _: training.output_distance(m, m, [X]),
    "export": lambda m, _: depcut.export(m, "never.onnx", X),
    "compare": lambda m, _: depcut.compare(m, m, X),
    "bench": lambda m, _: depcut.bench({"a": m}, X),
    "compact": lambda m, _: depcut.compact(m, X),
}


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_calls_that_need_the_model_whole_refuse_it_by_name(kind: str) -> None:
    plan = depcut.analyze(net(), X).plan(0.4, align=1)
    model = fully_shard(net()) if kind == "fully_shard" else Hollow(net())
    remedy = "in a loop of your own" if kind == "fully_shard" else "fully_shard"
    remedies = {}
    for name, call in CALLS.items():
        with pytest.raises(DepcutError, match=kind) as caught:
            call(model, plan)
        remedies[name] = str(caught.value.remedy)
    assert [name for name, said in remedies.items() if remedy not in said] == []
