"""Gradients of a loss: what is kept of a batch in files changes no score, and bounds memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deep_nets import Subject, subject
from nets import NETS, Net, normal, seeded
from selection import swept
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import depcut
from depcut.calibration import saved
from depcut.calibration.data import Calibration
from depcut.calibration.gradients import gradients, trainable
from depcut.calibration.saved import Saved
from depcut.calibration.store import Store
from depcut.errors import DepcutError, InputError
from depcut.scores import Score, score

GENEROUS = 1 << 40
CRITERIA = ("taylor", "taylor_gate", "fisher", "snip", "hessian", "grasp")
QUICK = ("attention_gqa_expand", "tied_embedding")
SOME: list[Any] = [pytest.param(NETS[name], id=name) for name in QUICK]
SOME += swept((net for name, net in NETS.items() if name not in QUICK), 12)


def loss_of(output: Any, target: Tensor) -> Tensor:
    """Mean square, over all outputs of any structure."""
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    parts = [(t - target).square().mean() for t in leaves if t.is_floating_point()]
    return torch.stack(parts).sum()


def calibrated(analysis: depcut.Analysis, inputs: list[Any], memory: int) -> Calibration:
    items = [(x, torch.tensor(0.5 + i)) for i, x in enumerate(inputs)]
    data = analysis.calibrate(items, loss=loss_of, progress=False, memory=memory)
    assert data is not None
    return data


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of what goes to a store, however small it is."""
    numbers: list[int] = []
    plain = Saved._put
    monkeypatch.setattr(saved, "_SMALL", 0)
    monkeypatch.setattr(
        Saved, "_put", lambda self, group: numbers.append(group.number) or plain(self, group)
    )
    return numbers


def assert_same_scores(
    analysis: depcut.Analysis, data: Calibration, names: tuple[str, ...] = CRITERIA
) -> None:
    for name in names:
        both = [
            score(name, analysis.coupling, analysis.model, 0, replace(data, memory=memory))
            for memory in (GENEROUS, 1)
        ]
        for a, b in zip(*both, strict=True):
            np.testing.assert_array_equal(a, b)


# Results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", SOME)
def test_what_is_kept_in_files_changes_no_score(net: Net, put: list[int]) -> None:
    torch.manual_seed(0)
    analysis = depcut.analyze(net.build().eval(), net.inputs(2))
    sizes = (3, 2) if analysis.program.dynamic else (2, 2)
    assert_same_scores(analysis, calibrated(analysis, [net.inputs(n) for n in sizes], GENEROUS))
    assert put


class Sign(torch.autograd.Function):
    """The sign, whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Own(nn.Module):
    """Has a region without gradients, and a derivative that its operators do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        with torch.no_grad():
            gate = hidden.exp()
        return self.b(Sign.apply(hidden) * gate)


def test_derivatives_are_those_of_the_model_and_not_of_its_operators(put: list[int]) -> None:
    model, x = seeded(Own, 0).eval(), normal(4, 8)
    analysis = depcut.analyze(model, x)
    data = calibrated(analysis, [x], GENEROUS)
    assert_same_scores(analysis, data, ("taylor", "snip"))
    assert put
    loss_of(model(x), data.batches[0].target).backward()
    parts = [model.a.weight, model.a.bias[:, None], model.b.weight.t()]
    given = [model.a.weight.grad, model.a.bias.grad[:, None], model.b.weight.grad.t()]
    summed = sum((g * p).double().sum(1) for g, p in zip(given, parts, strict=True))
    wanted = summed.detach().square().numpy()
    [found] = score(Score("taylor", normalize="none"), analysis.coupling, model, 0, data)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_batches_of_other_lengths_take_the_room_that_they_take(put: list[int]) -> None:
    model, long = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), normal(4, 7, 6)
    analysis = depcut.analyze(model, long[:2, :3])
    data = calibrated(analysis, [long, long[:3, :2]], GENEROUS)
    alone = calibrated(depcut.analyze(model, long), [long], GENEROUS)
    assert data.batches[0].resized is not None
    assert saved._largest(data) == saved._largest(alone)
    assert_same_scores(analysis, data, ("taylor",))
    assert put


def test_gradients_that_are_sparse_count_like_others() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 3)), 0)
    words = torch.arange(12).reshape(3, 4) % 9
    analysis = depcut.analyze(model, words)
    data = calibrated(analysis, [words, words[:2]], GENEROUS)
    found = [score(name, analysis.coupling, model, 0, data) for name in ("snip", "taylor")]
    model[0].sparse = False
    wanted = [score(name, analysis.coupling, model, 0, data) for name in ("snip", "taylor")]
    np.testing.assert_allclose(found, wanted)


def test_where_torch_keeps_nothing_apart_the_memory_that_it_takes_is_named() -> None:
    it = subject("mlp", 2)

    def penalty(output: Tensor, _target: Tensor) -> Tensor:
        return output.sum() + torch.func.grad(lambda z: (z**3).sum())(output).mean()

    data = calibrated(it.analysis, [it.inputs(3)], 1)
    data = replace(data, loss=penalty)
    with pytest.raises(InputError, match=r'(?s)torch\.func.*memory="1MiB" or more'):
        score("taylor", it.analysis.coupling, it.model, 0, data)
    score("taylor", it.analysis.coupling, it.model, 0, replace(data, memory=1 << 20))


# Memory -------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators made within the context."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {t.untyped_storage().data_ptr() for t in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and not self._is_known(leaf):
                storage = leaf.untyped_storage()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return out

    def _is_known(self, tensor: Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        known = at in self.known
        self.known.add(at)
        return known

    def _freed(self, at: int, nbytes: int) -> None:
        self.known.discard(at)
        self.now -= nbytes


def peak(it: Subject, memory: int) -> int:
    data = calibrated(it.analysis, [it.inputs(64)], memory)
    with trainable(it.model) as model, Alive(model.parameters()) as alive:
        for _ in gradients(model, data, lambda _name, _gradient: None):
            pass
    return alive.most


def test_what_is_held_does_not_grow_with_depth(put: list[int], one_thread: None) -> None:
    few, many = subject("mlp", 1), subject("mlp", 4)
    assert peak(many, 1) <= 1.01 * peak(few, 1)
    assert peak(many, 1) < peak(many, GENEROUS) / 3


def test_one_gradient_is_held_at_a_time() -> None:
    it = subject("mlp", 3)
    own = torch.ones(4, requires_grad=True)
    data = calibrated(it.analysis, [it.inputs(3), it.inputs(2)], GENEROUS)
    data = replace(data, loss=lambda output, target: loss_of(output * own, target))
    seen: list[weakref.ref[Tensor]] = []

    def reduced(_name: str, gradient: Tensor) -> float:
        assert not any(ref() is not None for ref in seen)
        seen.append(weakref.ref(gradient))
        return float(gradient.sum())

    with trainable(it.model) as model:
        found = list(gradients(model, data, reduced))
        wanted = list(gradients(model, data))
    assert own.grad is None
    assert len(seen) == 2 * len(found[0])
    for a, b in zip(found, wanted, strict=True):
        assert a == {name: float(g.sum()) for name, g in b.items()}


# Files --------------------------------------------------------------------------------------------


@contextmanager
def folder_of(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield
    assert not list(path.iterdir())


def test_no_file_is_left(put: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = subject("mlp", 3)
    data = calibrated(it.analysis, [it.inputs(3), it.inputs(2)], 1)
    written: list[int] = []

    def failing(output: Tensor, target: Tensor) -> Tensor:
        written.append(len(list(tmp_path.rglob("*.bin"))))
        return output.sum() * target if len(written) == 1 else output.sum() / 0 * 0

    with folder_of(monkeypatch, tmp_path):
        score("snip", it.analysis.coupling, it.model, 0, data)
    with folder_of(monkeypatch, tmp_path), pytest.raises(InputError, match="nan"):
        score("taylor", it.analysis.coupling, it.model, 0, replace(data, loss=failing))
    assert written[0] > 10
    assert put


def test_what_cannot_be_kept_is_named(monkeypatch: pytest.MonkeyPatch, put: list[int]) -> None:
    it = subject("mlp", 2)
    data = calibrated(it.analysis, [it.inputs(3)], 1)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(DepcutError, match="cannot be kept in a file"):
        score("taylor", it.analysis.coupling, it.model, 0, data)
    assert put


# What autograd does with it -----------------------------------------------------------------------


def differentiated(net: Callable[[Tensor], Tensor], budget: int) -> Tensor:
    x = normal(2000).requires_grad_()
    with Store(budget) as host, Store(0) as files:
        kept = Saved(host, files, [])
        with kept.hooks():
            y = net(x)
        (found,) = torch.autograd.grad(y.sum(), x)
        assert not kept._in_memory
        assert not host.held
    return found


@pytest.mark.parametrize("budget", [GENEROUS, 20_000, 1])
def test_what_is_written_to_after_it_was_saved_is_refused(budget: int) -> None:
    def changed(x: Tensor) -> Tensor:
        y = x.exp()
        z = (y * y).sin()
        y.add_(1)
        return z

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        differentiated(changed, budget)
    x = normal(2000)
    fine = differentiated(lambda x: (2 * x).relu_().sin(), budget)
    torch.testing.assert_close(fine, 2 * (2 * x).cos() * (x > 0))
