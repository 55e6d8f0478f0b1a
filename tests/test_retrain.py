"""The loop: it learns, resumes bit for bit after a kill, and says what went wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import depcut
from depcut.errors import DepcutError, InputError, TrainingError

pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

loss = functional.cross_entropy


class Net(nn.Module):
    """Convolution, BatchNorm, dropout: all that makes a run depend on its history."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def data(rows: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (rows,), generator=generator)
    images = torch.randn(rows, 1, 6, 6, generator=generator)
    return TensorDataset(images + labels[:, None, None, None], labels)


class Noisy(TensorDataset):
    """Augmentation that draws from torch, numpy and random."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        noise = torch.randn(()) + np.random.randn() + random.random()  # noqa: NPY002
        return x + 0.05 * float(noise), y


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(*data().tensors), batch_size=8, shuffle=True, **options)


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def accuracy(output: Tensor, target: Tensor) -> float:
    return float((output.argmax(1) == target).float().mean())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def retrain(model: nn.Module | None = None, train: Any = None, **options: Any) -> Any:
    given = {"epochs": 2, "loss": loss, "lr": 0.1, "schedule": "llr", "progress": False, **options}
    return depcut.training.retrain(model or net(), train or loader(), **given)


# What it does -------------------------------------------------------------------------------------


def test_a_smaller_model_learns_and_the_callers_stays_as_it_is() -> None:
    dense = net().eval()
    plan = depcut.analyze(dense, torch.randn(2, 1, 6, 6)).plan(0.5, of="channels", align=1)
    slim = plan.apply(dense)
    before, state = snapshot(slim), torch.get_rng_state()
    numpy_state, python_state = np.random.get_state()[1], random.getstate()  # noqa: NPY002
    made = retrain(slim, valid=DataLoader(data(), batch_size=20), epochs=8, schedule="auto",
                   metric=accuracy, plan=plan)  # fmt: skip
    assert_untouched(slim, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert random.getstate() == python_state
    assert type(made.model) is Net
    assert not made.model.training
    assert set(vars(made.model)) == set(vars(slim))
    assert all(p.grad is None for p in made.model.parameters())
    first, last = made.history[0], made.history[-1]
    assert last["loss"] < first["loss"]
    assert max(r["metric"] for r in made.history) > 0.8
    assert list(first) == ["epoch", "steps", "lr", "loss", "valid_loss", "metric", "seconds"]
    assert [r["steps"] for r in made.history] == [6 * i for i in range(1, 9)]
    assert made.settings["schedule"] == "allr"
    assert made.settings["distance"] == depcut.training.relative_distance(dense, plan)
    json.dumps(made.history)


def test_the_best_epochs_weights_come_back(tmp_path: Path) -> None:
    valid = DataLoader(data(), batch_size=48)
    for folder in (None, tmp_path):
        made = retrain(
            epochs=4, valid=valid, metric=scored([0, 0.1, 0.9, 0.3, 0.2]), checkpoint=folder
        )
        assert made.best_epoch == 2
        halfway = retrain(epochs=4, valid=valid, metric=scored([0, 0.1, 0.9, 0.3]), patience=1)
        assert halfway.stopped
        assert len(halfway.history) == 3
        assert same(made.model, halfway.model)
        lower = retrain(epochs=4, valid=valid, metric=scored([4, 3, 2, 1, 2]), maximize=False)
        assert lower.best_epoch == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best-2.safetensors", "history.json", "step-000000024",
    ]  # fmt: skip
    assert json.loads((tmp_path / "history.json").read_text())[1]["metric"] == 0.9


def test_the_start_comes_back_if_no_epoch_is_better(tmp_path: Path) -> None:
    valid = DataLoader(data(), batch_size=48)
    model = net().eval()
    for folder in (None, tmp_path):
        made = retrain(model, valid=valid, metric=scored([0.9, 0.5, 0.9]), checkpoint=folder)
        assert made.start["metric"] == 0.9
        assert made.best_epoch == 0
        assert same(made.model, model)
    impatient = retrain(model, epochs=3, valid=valid, metric=scored([0.9, 0.5]), patience=1)
    assert len(impatient.history) == 1
    assert retrain(model).start == {}


def scored(values: list[float]) -> Any:
    left = iter(values)
    return lambda *_: next(left)


def test_validation_loss_is_the_mean_over_examples() -> None:
    valid = DataLoader(data(), batch_size=20)
    made = retrain(epochs=1, valid=valid)
    images, labels = data().tensors
    with torch.no_grad():
        expected = float(loss(made.model.eval()(images), labels))
    assert made.history[0]["valid_loss"] == pytest.approx(expected, rel=1e-5)


def test_it_is_the_plain_loop() -> None:
    batches = [(x, y) for x, y in DataLoader(data(), batch_size=8)]
    torch.manual_seed(1)
    model = Net()
    model.drop.p = 0.0
    made = retrain(model, batches, optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9))
    mine = Net()
    mine.drop.p = 0.0
    mine.load_state_dict(model.state_dict())
    matrices = [p for p in mine.parameters() if p.ndim > 1]
    rest = [p for p in mine.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    rates = depcut.training.schedule("llr", sgd, 0.1, 12)
    for _ in range(2):
        for x, y in batches:
            sgd.zero_grad()
            loss(mine(x), y).backward()
            sgd.step()
            rates.step()
    assert mine.state_dict().keys() == made.model.state_dict().keys()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_one_large_batch() -> None:
    images, labels = data(40).tensors
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    small = list(zip(images.split(8), labels.split(8), strict=True))
    large = list(zip(images.split(16), labels.split(16), strict=True))
    many = retrain(model, small, gradient_accumulation=2)
    few = retrain(model, large)
    assert many.settings["steps"] == few.settings["steps"] == 6
    for a, b in zip(many.model.parameters(), few.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_callers_optimizer_is_copied_with_its_state() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss(model(data().tensors[0]), data().tensors[1]).backward()
    sgd.step()
    before = [s["momentum_buffer"].clone() for s in sgd.state.values()]
    warm = retrain(model, optimizer=sgd, lr=None)
    cold = retrain(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    after = [s["momentum_buffer"] for s in sgd.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sgd.param_groups[0]["params"][0] is next(model.parameters())
    assert not same(warm.model, cold.model)


@pytest.mark.parametrize(
    ("model", "kind"),
    [(nn.Sequential(nn.Conv2d(1, 9, 3), nn.Flatten(), nn.Linear(9 * 16, 3)), "AdamW"),
     (nn.Sequential(nn.Conv2d(1, 9, 6), nn.Flatten(), nn.Linear(9, 3)), "SGD")],
)  # fmt: skip
def test_the_rule_of_the_default_optimizer(model: nn.Module, kind: str) -> None:
    assert retrain(model, epochs=1).settings["optimizer"] == kind


def test_dicts_and_losses_of_the_output() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(36, 3)

        def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layer(pixels.flatten(1))
            return {"loss": loss(logits, labels), "logits": logits}

    images, labels = data().tensors
    items = [
        {"pixels": x, "labels": y, "idle": y}
        for x, y in zip(images.split(8), labels.split(8), strict=True)
    ]
    made = retrain(WithLoss(), items, epochs=6, loss=lambda output, item: output["loss"])
    assert made.history[-1]["loss"] < made.history[0]["loss"]


def test_distillation_alone_and_beside_the_task() -> None:
    dense = net().eval()
    plan = depcut.analyze(dense, torch.randn(2, 1, 6, 6)).plan(0.5, of="channels", align=1)
    slim = plan.apply(dense)
    with depcut.training.Distillation(dense, slim, plan, hidden=("norm",)) as distill:
        alone = retrain(slim, distillation=distill, loss=None, epochs=5)
        both = retrain(slim, distillation=distill, epochs=1)
        assert sum(len(m._forward_hooks) for m in slim.modules()) == 1
    assert alone.history[-1]["loss"] < alone.history[0]["loss"]
    assert not any(m._forward_hooks for m in alone.model.modules())
    assert not same(alone.model, both.model)


def test_mixed_precision_leaves_no_trace_behind() -> None:
    made = retrain(mixed_precision="bf16")
    assert made.settings["mixed_precision"] == "bf16"
    assert all(p.dtype == torch.float32 for p in made.model.parameters())
    assert set(vars(made.model)) == set(vars(net()))
    assert made.model(torch.randn(2, 1, 6, 6)).dtype == torch.float32
    assert retrain().settings["mixed_precision"] == "no"


def test_a_schedule_of_torchs() -> None:
    def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)

    assert retrain(schedule=one_cycle).settings["schedule"] == "OneCycleLR"


def test_equal_seeds_give_equal_models_and_others_do_not() -> None:
    torch.manual_seed(123)
    first = retrain()
    assert same(first.model, retrain().model)
    assert not same(first.model, retrain(seed=1).model)
    generator = torch.Generator().manual_seed(9)
    again = retrain(train=loader(generator=generator))
    assert same(again.model, retrain(train=loader(generator=generator)).model)


# Resumption ---------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    pass


class Interrupt:
    """When a training stops: at a call of its loss that is differentiated."""

    at: int | None = None
    calls = 0


def interruptible(output: Tensor, target: Tensor) -> Tensor:
    """The same function, whether it stops or not: another one would be another training."""
    if torch.is_grad_enabled():
        Interrupt.calls += 1
        if Interrupt.calls - 1 == Interrupt.at:
            raise Stop
    return loss(output, target)


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    Interrupt.at, Interrupt.calls = at, 0
    with pytest.raises(Stop):
        yield
    Interrupt.at = None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, None])
@pytest.mark.parametrize(("at", "every"), [(7, 1), (9, 2), (13, None)])
def test_an_interrupted_run_ends_with_the_same_weights(
    at: int, every: int | None, optimizer: Any, tmp_path: Path
) -> None:
    options = {"valid": DataLoader(data(), batch_size=16), "epochs": 3, "optimizer": optimizer}
    options["loss"] = interruptible
    whole = retrain(**options)
    with interrupted(at):
        retrain(checkpoint=tmp_path, every=every, **options)
    resumed = retrain(checkpoint=tmp_path, every=every, **options)
    assert resumed.resumed == {1: 7, 2: 8, None: 12}[every]
    assert same(resumed.model, whole.model)
    plain = [[{**r, "seconds": 0} for r in made.history] for made in (whole, resumed)]
    assert plain[0] == plain[1]
    finished = retrain(checkpoint=tmp_path, every=every, **options)
    assert finished.resumed == 18
    assert same(finished.model, whole.model)
    assert not list(tmp_path.glob("**/.draft*"))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation": 4, "every": 1},
        {"train": loader(num_workers=1), "every": 2},
        {"train": loader(generator=torch.Generator()), "every": 2},
        {"mixed_precision": "bf16", "every": 1, "max_grad_norm": 0.5},
        {"schedule": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, n), "every": 1},
    ],
    ids=["accumulation", "workers", "generator", "bf16", "one cycle"],
)
def test_other_runs_resume_alike(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "loss": interruptible}
    whole = retrain(**options)
    with interrupted(11):
        retrain(checkpoint=tmp_path, **options)
    resumed = retrain(checkpoint=tmp_path, **options)
    assert resumed.resumed in (3, 10, 11)
    assert same(resumed.model, whole.model)


SCRIPT = """
import sys, time
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from torch.nn import functional
from test_retrain import loader, net
import depcut

pause = float(sys.argv[2])
def slow(output, target):
    time.sleep(pause)
    return functional.cross_entropy(output, target)

made = depcut.training.retrain(net(), loader(), epochs=4, loss=slow, lr=0.1, schedule="llr",
                      checkpoint=sys.argv[1], every=2, progress=False)
print(made.resumed)
save_file(made.model.state_dict(), sys.argv[1] + "/final.safetensors")
"""


def script(folder: Path, pause: float) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(Path(depcut.__file__).parents[1]), str(here)])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(pause)], text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.sweep
def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    first = script(killed, 0.15)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(
        int(p.name[5:]) >= 8 for p in killed.glob("step-*")
    ):
        assert first.poll() is None
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not (killed / "final.safetensors").exists()
    ends = []
    for folder in (killed, tmp_path / "whole"):
        done = script(folder, 0.0)
        out, _ = done.communicate(timeout=120)
        assert done.returncode == 0
        ends.append((int(out), (folder / "final.safetensors").read_bytes()))
    assert 8 <= ends[0][0] < 24
    assert ends[1][0] == 0
    assert ends[0][1] == ends[1][1]


def test_a_draft_of_a_killed_write_is_ignored_and_goes(tmp_path: Path) -> None:
    whole = retrain(checkpoint=tmp_path / "a")
    (tmp_path / "b" / ".draft-xyz").mkdir(parents=True)
    (tmp_path / "b" / ".draft-xyz" / "state.json").write_text('{"dict": [')
    assert same(retrain(checkpoint=tmp_path / "b").model, whole.model)
    assert not (tmp_path / "b" / ".draft-xyz").exists()


def test_a_checkpoint_holds_tensors_and_json_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    retrain(checkpoint=tmp_path, optimizer=torch.optim.AdamW)
    (step,) = tmp_path.glob("step-*")
    assert sorted(p.name for p in step.iterdir()) == ["state.json", "state.safetensors"]
    names = set(load_file(step / "state.safetensors"))
    assert {"/model/conv.weight", "/optimizer/state/conv.weight/exp_avg"} <= names
    json.loads((step / "state.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 0.2}, "lr was 0.1 and is 0.2"), ({"epochs": 5}, "steps was 12 and is 30"),
     ({"seed": 3}, "seed was 0 and is 3")],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    retrain(checkpoint=tmp_path)
    with pytest.raises(TrainingError, match=message) as caught:
        retrain(checkpoint=tmp_path, **change)
    assert "resume=False" in str(caught.value)
    assert retrain(checkpoint=tmp_path, resume=False, **change).resumed == 0


def test_a_checkpoint_of_other_weights_and_a_broken_one(tmp_path: Path) -> None:
    retrain(checkpoint=tmp_path)
    with pytest.raises(TrainingError, match="weights was"):
        retrain(Net(), checkpoint=tmp_path)
    (step,) = tmp_path.glob("step-*")
    (step / "state.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot be read"):
        retrain(checkpoint=tmp_path)


# Mistakes -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    factors = [1.0] * 8 + [float("nan")] + [1.0] * 20

    def bad(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target) * factors.pop(0)

    model = net()
    before = snapshot(model)
    with pytest.raises(TrainingError, match=r"loss is nan at step 9 \(epoch 2, step 3 of 6\)") as e:
        retrain(model, loss=bad, checkpoint=tmp_path, every=4)
    assert str(tmp_path) in str(e.value)
    assert "lower lr" in str(e.value)
    assert_untouched(model, before)
    resumed = retrain(model, loss=bad, checkpoint=tmp_path, every=4)
    assert resumed.resumed == 8
    assert all(p.isfinite().all() for p in resumed.model.parameters())


def test_a_gradient_that_is_not_finite_is_not_stepped_along() -> None:
    def steep(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.detach()).abs().sqrt().sum() * 0 + loss(output, target)

    with pytest.raises(TrainingError, match="gradient's norm is nan at step 1"):
        retrain(loss=steep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": 1}, "patience needs validation data"),
        ({"every": 0}, "every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"train": []}, "the loader is empty"),
        ({"train": (x for x in [1])}, "can be read only once"),
        ({"train": torch.ones(3)}, "the loader is a Tensor"),
        ({"valid": []}, "the loader is empty"),
        ({"loss": lambda o, t: loss(o, t, reduction="none")}, r"a tensor of shape \(8,\)"),
        ({"loss": lambda o, t: 1.0}, "the loss is a float, not a scalar tensor"),
        ({"loss": None}, "nothing to minimise"),
        ({"loss": "mse"}, "loss is a str"),
        ({"valid": [1], "metric": 3}, "metric is a int"),
        ({"lr": None}, "no learning rate"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"schedule": "linear"}, "no schedule 'linear'"),
        ({"schedule": "alr"}, "did you mean 'allr'"),
        ({"schedule": "allr"}, "there is no plan"),
        ({"schedule": "slr"}, "only their peak is known"),
        ({"schedule": lambda o, n: 3}, "the schedule is a int"),
        ({"optimizer": "adam"}, "optimizer is a str"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)}, "no parameter of the model"),
        ({"mixed_precision": "fp7"}, "accelerate refuses"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    model = net()
    before = snapshot(model)
    given = {"epochs": 2, "loss": loss, "lr": 0.1, "schedule": "llr", "train": loader(), **options}
    with pytest.raises(InputError, match=message) as caught:
        depcut.training.retrain(model, progress=False, **given)
    assert caught.value.remedy
    assert_untouched(model, before)


def test_validation_without_anything_to_judge_by() -> None:
    dense = net().eval()
    plan = depcut.analyze(dense, torch.randn(2, 1, 6, 6)).plan(0.5, of="channels", align=1)
    with (
        depcut.training.Distillation(dense, plan.apply(dense), plan) as distill,
        pytest.raises(InputError, match="neither a metric nor a loss"),
    ):
        retrain(plan.apply(dense), valid=loader(), loss=None, distillation=distill)


class Short:
    """Says that it has more batches than it has."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(data(), batch_size=8))


def test_a_loader_that_ends_early() -> None:
    with pytest.raises(InputError, match="ended after 6 of 9 batches in epoch 1"):
        retrain(train=Short())


def test_accelerate_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(DepcutError, match=r"accelerate, which is not installed(.|\n)*pip install"):
        retrain()


# Several processes --------------------------------------------------------------------------------

TWO = """
import sys
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import DataLoader
from test_retrain import accuracy, data
import depcut
from accelerate import PartialState

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
batches = list(DataLoader(data(), batch_size=int(sys.argv[2])))
made = depcut.training.retrain(model, batches, list(DataLoader(data(44), batch_size=8)), epochs=2,
                      loss=functional.cross_entropy, lr=0.1, schedule="llr", metric=accuracy,
                      checkpoint=sys.argv[1] + "/states", progress=False)
state = PartialState()
save_file({**made.model.state_dict(), "metric": torch.tensor(made.history[-1]["metric"]),
           "loss": torch.tensor(made.history[-1]["loss"])},
          f"{sys.argv[1]}/{state.process_index}-{state.num_processes}.safetensors")
if state.num_processes > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.sweep
def test_two_processes_train_as_one_with_batches_of_both(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "two.py").write_text(TWO)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(Path(depcut.__file__).parents[1]), str(here)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, size in ((launch, "8"), ([], "16")):
        folder = tmp_path / size
        folder.mkdir()
        command = [sys.executable, *start, str(tmp_path / "two.py"), str(folder), size]
        subprocess.run(command, check=True, env=environment, timeout=120, capture_output=True)
    ends = [load_file(p) for p in sorted(tmp_path.glob("*/?-?.safetensors"))]
    assert len(ends) == 3
    for name, value in ends[0].items():
        for other in ends[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)
