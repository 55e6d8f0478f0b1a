"""A folder of an earlier run: the same call goes on, another one is refused with what differs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import sampled
from torch import Tensor, nn
from torch.nn import functional

from depcut.errors import InputError, TrainingError
from depcut.training import iterate, retrain
from depcut.training.identity import callable_text, data_text


def net(width: int = 12, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), act(), nn.Linear(width, 4)).eval()


def batches(seed: int = 0, count: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 6, generator=generator), torch.randn(4, 4)) for _ in range(count)]


DATA = batches()


def trained(folder: Path, **changes: Any) -> Any:
    given = {"model": net(), "train": DATA, "loss": functional.mse_loss, "epochs": 1, "lr": 0.1}
    return retrain(**{**given, **changes}, checkpoint=folder, progress=False)


def scaled(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: factor * functional.mse_loss(output, target)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another loss": ({"loss": functional.l1_loss}, r"loss was '.*mse_loss .*l1_loss"),
    "another factor in the loss": ({"loss": scaled(2.0)}, "loss was"),
    "another loss module": ({"loss": nn.MSELoss(reduction="sum")}, "loss was"),
    "other data": ({"train": batches(1)}, "data was"),
    "more data": ({"train": batches(0, 4)}, "steps was 3 and is 4"),
    "another activation": ({"model": net(act=nn.Tanh)}, "structure was"),
}


@pytest.mark.parametrize("name", sampled(list(OTHERS), ["another loss", "other data"]))
def test_another_training_in_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    change, words = OTHERS[name]
    trained(tmp_path)
    with pytest.raises(TrainingError, match=f"another training: {words}"):
        trained(tmp_path, **change)
    assert trained(tmp_path).resumed == 3


def test_the_same_loss_made_again_goes_on(tmp_path: Path) -> None:
    trained(tmp_path, loss=scaled(2.0))
    assert trained(tmp_path, loss=scaled(2.0)).resumed == 3
    with pytest.raises(TrainingError, match="loss was"):
        trained(tmp_path, loss=scaled(3.0))


def halve(model: nn.Module, _step: int) -> None:
    with torch.no_grad():
        model[0].weight.mul_(0.5)


def double(model: nn.Module, _step: int) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2.0)


def turns(folder: Path, **changes: Any) -> Any:
    given = {"model": net(), "ratio": 0.4, "inputs": torch.randn(3, 6), "retrain": halve}
    return iterate(**{**given, **changes}, steps=2, align=1, checkpoint=folder, progress=False)


TURNS: dict[str, tuple[dict[str, Any], str]] = {
    "another function": ({"retrain": double}, r"retrain was '.*halve .*double"),
    "other weights": ({"model": nn.Sequential(*net()[:2], nn.Linear(12, 4))}, "weights was"),
    "another activation": ({"model": net(act=nn.Tanh)}, "structure was"),
    "data": ({"data": [torch.randn(4, 6)], "compensate": False}, "data was None"),
}


@pytest.mark.parametrize("name", sampled(list(TURNS), ["another function"]))
def test_other_turns_in_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    change, words = TURNS[name]
    turns(tmp_path)
    with pytest.raises(InputError, match=rf"another run: (.|\n)*{words}"):
        turns(tmp_path, **change)
    assert len(turns(tmp_path).steps) == 2


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight, self.seen = weight, []

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.seen.append(1)
        return self.weight * functional.mse_loss(output, target)

    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target)


def counting() -> Callable[[Tensor, Tensor], Tensor]:
    calls, seen = 0, []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        seen.append(calls)
        return functional.mse_loss(output, target)

    return loss


def test_what_a_function_collects_does_not_tell_it_from_itself() -> None:
    for loss in (counting(), Weighted(1.0), Weighted(1.0).method):
        before = callable_text(loss)
        loss(torch.zeros(1), torch.ones(1))
        assert callable_text(loss) == before


def test_options_and_code_tell_functions_apart() -> None:
    weight = torch.tensor([1.0, 2.0])
    made = [
        *(Weighted(1.0), Weighted(2.0), Weighted(2.0).method, scaled(1.0), scaled(2.0)),
        functools.partial(functional.cross_entropy, label_smoothing=0.1),
        functools.partial(functional.cross_entropy, label_smoothing=0.2),
        *(nn.CrossEntropyLoss(weight), nn.CrossEntropyLoss(weight + 1), nn.CrossEntropyLoss()),
        *(functional.mse_loss, lambda o, t: (o - t).sum(), lambda o, t: (o + t).sum()),
    ]
    assert len(set(map(callable_text, made))) == len(made)


PROGRAM = """
import torch
from torch import nn
from depcut.training.identity import callable_text, data_text
def loss(output, target, kind={"a", "b", "c"}, *, scale=2.0):
    return scale * (output - target).abs().sum() if "x" in {"p", "q", "r"} else output.sum()
print(callable_text(loss), callable_text(nn.CrossEntropyLoss()), data_text([torch.ones(3)]))
"""


@pytest.mark.sweep
def test_another_process_gives_the_same_texts() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            capture_output=True,
            check=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert data_text([torch.ones(3)]) in said.pop()
