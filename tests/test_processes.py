"""Several processes, sharded and offloaded models: the same as one plain one."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import depcut
from depcut.calibration import sharing
from depcut.calibration.folds import Folds
from depcut.capture.plain import plain
from depcut.errors import InputError, ProcessError
from depcut.support.processes import ALONE, Processes, processes

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark that launches processes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("processes", None)
    import processes

    return processes


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 8, generator=generator) for _ in range(count)]


@dataclass(frozen=True)
class Said(Processes):
    """Processes whose others say what they are told to."""

    others: dict[str, Any] = field(default_factory=dict)

    def exchanged(self, label: str, value: Any = None) -> list[Any]:
        return [value, *(self.others.get(label, value) for _ in range(self.size - 1))]


def test_one_process_works_alone() -> None:
    assert processes() is ALONE
    tensor = torch.ones(2)
    assert ALONE.summed("", [tensor])[0] is tensor


@pytest.mark.parametrize(
    ("rank", "count", "numbers", "idle"),
    [(0, 5, (0, 2, 4), False), (1, 5, (1, 3), False), (1, 1, (0,), True)],
)
def test_items_are_shared_out_in_turns(
    monkeypatch: pytest.MonkeyPatch, rank: int, count: int, numbers: tuple[int, ...], idle: bool
) -> None:
    monkeypatch.setattr(sharing, "processes", lambda: Said(rank, 2))
    items, share = sharing.shared_out(list(range(count)), 32)
    assert items == list(numbers) == list(share.numbers)
    assert (share.total, share.everyone.idle) == (count, idle)


def test_other_items_in_another_process_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"a sampler that gives each process its own share": False, "item 0": "00000000"}
    monkeypatch.setattr(sharing, "processes", lambda: Said(0, 2, others={"data": theirs}))
    with pytest.raises(ProcessError, match=r"item 0 is \w+ in process 0, 00000000 in process 1"):
        sharing.shared_out(batches(1), 32)


def test_a_loader_that_gives_each_process_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "processes", lambda: Said(1, 2))
    rows = torch.zeros(12, 8)
    own = DataLoader(rows, 2, sampler=DistributedSampler(rows, 2, 1))  # type: ignore[arg-type]
    assert sharing.own_items(own)
    assert not sharing.own_items(DataLoader(rows, 2))  # type: ignore[arg-type]
    assert sharing.most_to_read(5, True) == 2


def test_folds_follow_the_numbers_of_all_batches() -> None:
    x, y = torch.randn(2, 1, 6, 3), torch.randn(2, 1, 6, 2)
    folds = Folds(4)
    folds.add(1, x[0], y[0])
    folds.add(3, x[1], y[1])
    even, odd = folds.moments("", ALONE)
    assert even.count == 0
    assert not even.xx.any()
    assert odd.count == 12


def test_an_offloaded_model_is_put_together_and_left_alone() -> None:
    from accelerate import cpu_offload

    dense = net().eval()
    model = cpu_offload(copy.deepcopy(dense), execution_device="cpu") or dense
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    slim = depcut.shrink(model, 0.4, batches()[0], align=1)
    want = depcut.shrink(dense, 0.4, batches()[0], align=1)
    assert_same(slim, want)
    assert all(p.is_meta for p in model.parameters())
    assert before == {n: sorted(vars(m)) for n, m in model.named_modules()}
    assert "accelerate" in " ".join(depcut.report(slim).notes)
    with pytest.raises(InputError, match="device_map"):
        depcut.training.Gradual(model, 0.4, batches()[0], start=0, end=2, every=1)


def test_a_plain_model_is_itself() -> None:
    model = net()
    assert plain(model) is model


def assert_same(slim: nn.Module, want: nn.Module) -> None:
    """Two models have the same class and equal tensors."""
    assert type(slim) is type(want)
    ours, theirs = slim.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.sweep
def test_a_model_on_the_disk_gives_what_the_plain_one_does(launcher: Any, tmp_path: Path) -> None:
    from accelerate import disk_offload

    model, data = launcher.llama()
    chosen = {"data": data, "align": 1, "rebuildable": False, "progress": False}
    want = depcut.shrink(model, 0.4, **chosen)
    offloaded = disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu") or model
    assert any(p.is_meta for p in offloaded.parameters())
    slim = depcut.shrink(offloaded, 0.4, **chosen)
    assert depcut.report(slim).digest == depcut.report(want).digest
    assert_same(slim, want)
    assert offloaded(**data[0]).logits.shape == (2, 16, 64)


@pytest.mark.sweep
def test_two_processes_give_what_one_does(launcher: Any) -> None:
    rows = ["convnet, obs and compensation", "convnet, fewer batches than processes"]
    found = launcher.table([1, 2], [*rows, "convnet, apoz"])
    assert all(row["same plan as one"] for row in found)
    assert all(row["bytes equal in all processes"] for row in found)
    assert max(row["largest difference of weights"] for row in found) < 1e-5


@pytest.mark.sweep
def test_a_sharded_model_is_shrunk_and_trained_on(launcher: Any, tmp_path: Path) -> None:
    import sharded

    found = sharded.results(tmp_path, (2,))
    one, two, back = (found[who] for who in ("one process", "2 processes", "restored by one"))
    assert one["plan"] == two["plan"]
    assert two["sharded as the dense one"]
    assert two["moments"] == ["(Shard(dim=0),)"]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert back["losses"] == pytest.approx(two["losses"][sharded.STEPS :], rel=1e-5)
    assert launcher.difference(one["weights"], two["weights"]) < 1e-4
    assert launcher.difference(two["weights"], back["weights"]) < 1e-4
    assert two["moved since the checkpoint"] > 1e-3


WRONG = """
import sys
import torch
from torch import distributed, nn
import depcut
distributed.init_process_group("gloo")
rank = distributed.get_rank()
def shrunk(seed=0, bad=False, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    torch.manual_seed(1)
    data = [torch.randn(8, 8) for _ in range(4)]
    if bad:
        data = [data[0], torch.full((8, 8), float("nan"))]
    return depcut.shrink(net, 0.4, data=data, align=1, **options)
def boom(output, target):
    if rank:
        raise ValueError("boom")
    return output.square().mean()
for case in (dict(seed=rank), dict(seed=0, bad=True), dict(loss=boom, score="taylor"), {}):
    try:
        shrunk(**case)
        print("fine", file=sys.stderr)
    except depcut.DepcutError as error:
        print(type(error).__name__, error.what, file=sys.stderr)
"""


@pytest.mark.sweep
def test_what_fails_in_one_process_is_named_in_all(launcher: Any) -> None:
    ended = launcher.launched(2, [sys.executable, "-c", WRONG], timeout=120)
    assert [code for code, _ in ended] == [0, 0], ended
    first, second = (error.strip().splitlines()[-4:] for _, error in ended)
    assert all("ProcessError" in lines[0] and "0.weight" in lines[0] for lines in (first, second))
    assert "process 1 of 2 failed" in first[1]
    assert second[1].startswith("InputError")
    assert "boom" in first[2]
    assert second[2].startswith("InputError it failed: ValueError: boom")
    assert first[3] == second[3] == "fine"
