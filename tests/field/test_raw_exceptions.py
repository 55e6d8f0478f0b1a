"""What somebody else's code raises, or passes by mistake, comes out as an error of depcut's own."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_calls import Net, inputs, loss, net, pairs, plan
from fuzz_models import EXCEPTIONS, OddError, OutsideError, RaisesWhenNarrow
from fuzz_pool import Hostile
from nets import NETS, normal, seeded
from oracle import assert_untouched, snapshot
from torch import Tensor, nn

import depcut
from depcut import training
from depcut.cli.main import main
from depcut.errors import CallError, DepcutError, InputError, PlanError

X = inputs(3)


@contextlib.contextmanager
def assert_refused(
    *words: str, kind: type[DepcutError] = InputError, model: nn.Module | None = None
) -> Iterator[None]:
    """The block raises an error with a remedy that says these words, and leaves all as it was."""
    before = None if model is None else snapshot(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    if model is not None:
        assert_untouched(model, before)


def few(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """All cases, of which only some are among the default tests."""
    sweep = pytest.mark.sweep
    return [pytest.param(c, marks=() if c in chosen else sweep, id=str(c)) for c in cases]


# What a model raises at new widths ----------------------------------------------------------------


@pytest.mark.parametrize("what", few(EXCEPTIONS, "Exception", "an odd class"))
def test_any_exception_of_the_model_at_new_widths_ends_in_a_repair(what: str) -> None:
    model = seeded(lambda: RaisesWhenNarrow(EXCEPTIONS[what]), 0)
    before = snapshot(model)
    slim = depcut.shrink(model, 0.5, X, align=1)
    assert slim(X).shape == (3, 4)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    assert_untouched(model, before)


class RaisesInside(nn.Module):
    def __init__(self, make: Callable[[], BaseException]) -> None:
        super().__init__()
        self.body = RaisesWhenNarrow(make)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("what", few(["Exception", "an odd class"], "Exception"))
def test_so_it_does_in_a_module_within(what: str) -> None:
    model = seeded(lambda: RaisesInside(EXCEPTIONS[what]), 0)
    slim = depcut.shrink(model, 0.4, X, data=[X, normal(5, 6)], align=1)
    assert slim(X).shape == (3, 2)


@pytest.mark.parametrize("kind", few([KeyboardInterrupt, SystemExit, MemoryError], MemoryError))
def test_what_nobody_should_handle_passes_through(kind: type[BaseException]) -> None:
    model = seeded(lambda: RaisesWhenNarrow(kind), 0)
    with pytest.raises(kind):
        depcut.shrink(model, 0.5, X, align=1)


class RaisesOnDevice(nn.Module):
    """Runs at any width; raises in every later stage that a flag names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()
        self.limit: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.limit is not None and x.shape[0] != self.limit:
            raise OddError(1, 2)
        return self.inner(x)


@pytest.mark.sweep
def test_export_and_bench_name_what_the_model_raises(tmp_path: Path) -> None:
    model = seeded(RaisesOnDevice, 0)
    model.limit = 7
    with assert_refused("OddError", "message cannot be read", kind=CallError, model=model):
        depcut.export(model, tmp_path / "a.onnx", X)
    with assert_refused("OddError", model=model):
        depcut.bench({"a": model}, X, runtime="torch", rounds=6)
    with assert_refused("OddError", kind=CallError, model=model):
        depcut.compare(model, model, X, runtime=None)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: depcut.shrink(net(), 0.5, X, score=f),
        lambda f: depcut.shrink(net(), 0.5, X, data=pairs(), loss=f, score="taylor"),
        lambda f: training.retrain(
            net(), pairs(), epochs=1, loss=loss, optimizer=f, lr=0.1, progress=False
        ),
        lambda f: training.iterate(net(), 0.5, X, optimizer=f, progress=False),
    ],
    ids=["score", "loss", "optimizer", "optimizer of iterate"],
)
def test_a_function_of_the_caller_that_raises_is_quoted(call: Callable[[Any], Any]) -> None:
    def failing(*_: object) -> Any:
        raise OutsideError("the function fails")

    with assert_refused("OutsideError", "the function fails"):
        call(failing)


def test_data_that_raises_is_quoted() -> None:
    def failing() -> Iterator[Tensor]:
        yield X
        raise OutsideError("the disk is gone")

    model = net()
    with assert_refused("OutsideError", "the disk is gone", "data=", model=model):
        depcut.shrink(model, 0.5, X, data=failing())


# What cannot be copied ----------------------------------------------------------------------------


def _open_file() -> Any:
    return Path(__file__).open(encoding="utf-8")


HELD: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "file": _open_file,
    "generator": lambda: (i for i in range(3)),
    "socket": socket.socket,
    "database": lambda: sqlite3.connect(":memory:"),
    "module": lambda: math,
    "logger": lambda: logging.getLogger("depcut.test"),
    "hostile": Hostile,
    "thread": threading.Thread,
}


@pytest.mark.parametrize("what", few(HELD, "lock", "database"))
def test_what_cannot_be_copied_is_shared(what: str) -> None:
    held = HELD[what]()
    model = net()
    model.first.held = held
    model.held = {"nested": [held]}
    try:
        slim = depcut.shrink(model, 0.5, X, align=1)
        assert slim(X).shape == (3, 4)
        assert slim.first.held is not None
        if what in ("lock", "file", "generator", "socket", "database", "module"):
            assert slim.first.held is held
        assert model.first.held is held
        depcut.compare(model, slim, X, runtime=None)
        depcut.bench({"slim": slim}, X, runtime="torch", rounds=6, warmup=0)
    finally:
        if hasattr(held, "close"):
            held.close()


class CopiesItself(nn.Module):
    """A class whose protocol for copies fails, as that of one that holds a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__}

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.inner(x)


def test_a_module_whose_own_protocol_of_copies_fails_is_copied_all_the_same() -> None:
    model = seeded(CopiesItself, 0)
    before = snapshot(model)
    slim = depcut.shrink(model, 0.5, X, align=1)
    assert slim(X).shape == (3, 4)
    assert slim.lock is model.lock
    assert slim.inner is not model.inner
    assert_untouched(model, before)


def test_a_forward_without_a_signature(tmp_path: Path) -> None:
    model = net()
    model.forward = torch.relu  # type: ignore[method-assign]
    with assert_refused("forward"):
        depcut.shrink(model, 0.5, X)
    with assert_refused("forward"):
        depcut.export(model, tmp_path / "a.onnx", X)


def test_lazy_parameters_are_named_with_what_settles_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    for call in (
        lambda: depcut.shrink(model, 0.5, X),
        lambda: depcut.analyze(model, X),
        lambda: depcut.compact(model, X),
        lambda: depcut.export(model, tmp_path / "a.onnx", X),
        lambda: depcut.bench({"a": model}, X, runtime="torch", rounds=6),
        lambda: depcut.compare(model, model, X, runtime=None),
    ):
        with assert_refused("lazy", "run the model once"):
            call()
    model(X)
    assert depcut.shrink(model.eval(), 0.5, X, align=1)(X).shape == (3, 2)


# Wrong inputs are not blamed on the model ---------------------------------------------------------


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.b(self.a(x).relu()).mean((2, 3)) * scale)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.a(self.table(ids)).relu())


WRONG: dict[str, tuple[Callable[[], nn.Module], Any, tuple[str, ...]]] = {
    "channels": (Conv, lambda: normal(2, 4, 8, 8), ("RuntimeError", "channels", "self.a(x)")),
    "rank": (Conv, lambda: normal(2, 3, 8), ("raises",)),
    "data type": (Conv, lambda: normal(2, 3, 8, 8).double(), ("RuntimeError", "ouble")),
    "integers": (Conv, lambda: torch.ones(2, 3, 8, 8, dtype=torch.int64), ("RuntimeError",)),
    "half a model": (
        lambda: Conv().half(),
        lambda: normal(2, 3, 8, 8),
        ("the model itself raises", "RuntimeError", "alf"),
    ),
    "keyword": (Conv, lambda: {"x": normal(2, 3, 8, 8), "sclae": 2.0}, ("sclae",)),
    "missing argument": (Conv, lambda: {"scale": torch.tensor(2.0)}, ("missing", "x")),
    "too many": (Conv, lambda: (normal(2, 3, 8, 8), 1.0, 2.0), ("too many",)),
    "floats for ids": (Words, lambda: normal(2, 5), ("RuntimeError", "indices")),
    "ids out of range": (
        Words,
        lambda: torch.full((2, 5), 20),
        ("the model itself raises IndexError", "index out of range"),
    ),
    "NumPy": (Conv, lambda: np.zeros((2, 3, 8, 8), np.float32), ("from_numpy",)),
    "NumPy within": (Conv, lambda: (normal(2, 3, 8, 8), np.zeros(3)), ("from_numpy",)),
    "lists": (Conv, lambda: [[[1.0, 2.0]], [[3.0, 4.0]]], ("tensor",)),
    "meta": (Conv, lambda: torch.empty(2, 3, 8, 8, device="meta"), ("meta",)),
    "empty": (Conv, lambda: torch.empty(0, 3, 8, 8), ()),
}


@pytest.mark.parametrize("what", few(WRONG, "half a model", "ids out of range", "meta", "NumPy"))
def test_wrong_inputs_are_not_blamed_on_the_model(what: str) -> None:
    make, given, words = WRONG[what]
    model = seeded(make, 0)
    with assert_refused(*words, model=model):
        depcut.shrink(model, 0.5, given(), align=1)


def test_wrong_data_is_not_blamed_on_the_model() -> None:
    model = seeded(Words, 0)
    good, bad = torch.ones(2, 5, dtype=torch.int64), torch.full((2, 5), 99)
    with assert_refused("IndexError", "data, item 1", kind=CallError, model=model):
        depcut.shrink(model, 0.5, good, data=[good, bad], align=1)
    with assert_refused("IndexError", "data, item 1", kind=CallError, model=model):
        depcut.analyze(model, good).plan(0.5, data=[good, bad], score="wanda")


@pytest.mark.sweep
def test_inputs_that_require_gradients_are_as_good_as_others(tmp_path: Path) -> None:
    x = X.clone().requires_grad_()
    slim = depcut.shrink(net(), 0.5, x, align=1)
    depcut.export(slim, tmp_path / "a.onnx", x)
    assert x.requires_grad
    assert x.grad is None


def test_export_quotes_the_model_on_wrong_inputs(tmp_path: Path) -> None:
    model = seeded(Conv, 0)
    with assert_refused("the model itself raises", "channels", model=model):
        depcut.export(model, tmp_path / "a.onnx", normal(2, 4, 8, 8))
    assert list(tmp_path.iterdir()) == []


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, 3, b"first", ["first"], {1: [0]}, {"first": Hostile()}])
def test_kept_units_of_a_wrong_kind(keep: Any) -> None:
    model = net()
    with assert_refused(kind=PlanError, model=model):
        depcut.analyze(model, X).plan_keeping(keep)


@pytest.mark.parametrize("name", ["keep", "ratois", "widths"])
def test_a_keyword_that_does_not_exist(name: str) -> None:
    with assert_refused(name):
        depcut.shrink(net(), 0.5, X, **{name: None})


@pytest.mark.parametrize(
    "ratio", ["x", math.nan, math.inf, 1j, torch.tensor(0.5), True, np.array([0.5]), 10**400]
)
def test_a_ratio_of_a_wrong_kind(ratio: Any) -> None:
    with assert_refused("ratio", model=(model := net())):
        depcut.shrink(model, ratio, X)
    for ratios in ({"first": ratio}, {None: 0.5}, {1: 0.5}, [("first", 0.5)], "first", b"x"):
        with assert_refused("ratios", model=model):
            depcut.shrink(model, 0.5, X, ratios=ratios)


@pytest.mark.parametrize("seed", [-1, "a", 1.5, 2**64, None, True])
def test_a_seed_of_a_wrong_kind(seed: Any) -> None:
    with assert_refused("seed"):
        depcut.shrink(net(), 0.5, X, seed=seed)
    with assert_refused("seed"):
        training.TrainingOptions(seed=seed)
    with assert_refused("seed"):
        training.fresh(net(), plan(), seed=seed)


def test_numpy_integers_count_as_integers() -> None:
    chosen = depcut.Options(align=np.int64(4), seed=np.uint8(3), threads=np.int32(2))
    assert (chosen.align, chosen.seed, chosen.threads) == (4, 3, 2)
    assert type(chosen.align) is int
    with assert_refused("align"):
        depcut.Options(align=np.bool_(True))


def test_a_loss_without_data_is_not_left_aside() -> None:
    with assert_refused("loss=", "data"):
        depcut.shrink(net(), 0.5, X, loss=loss)


def test_nothing_is_timed_and_nothing_asked_for_is_left_aside() -> None:
    for name, value in (("provider", "cpu"), ("batch_size", 4), ("pin", True), ("memory", True)):
        with assert_refused(name, "nothing is timed"):
            depcut.compare(net(), net(), X, runtime=None, **{name: value})


# Files --------------------------------------------------------------------------------------------


def _saved(folder: Path, **changes: Any) -> Path:
    path = folder / "plan.json"
    plan().save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, **changes}), encoding="utf-8")
    return path


SOME = ("Infinity", "out of range", "other sizes", "dtype load", "10^12 elements", "options")


def _described(shape: Any, dtype: Any) -> Any:
    return {"args": [{"shape": shape, "dtype": dtype}], "kwargs": {}}


TAMPERED: dict[str, dict[str, Any]] = {
    "Infinity": {"sizes": {"first": math.inf, "second": 24}},
    "NaN": {"kept": {"first": [math.nan]}},
    "a fraction": {"sizes": {"first": 16.5, "second": 24}},
    "out of range": {"kept": {"first": [0, 16]}},
    "negative": {"kept": {"first": [-1, 2]}},
    "twice": {"kept": {"first": [1, 1]}},
    "huge": {"kept": {"first": [10**30]}},
    "none": {"kept": {"first": []}},
    "other sizes": {"sizes": {"first": 99, "second": 24}, "kept": {"first": [98]}},
    "dtype load": {"inputs": _described([2, 6], "load")},
    "dtype class": {"inputs": _described([2, 6], "__class__")},
    "dtype number": {"inputs": _described([2, 6], 3)},
    "dtype quantized": {"inputs": _described([2, 6], "qint8")},
    "10^12 elements": {"inputs": _described([10**6, 10**6], "float32")},
    "10^30 elements": {"inputs": _described([10**30], "float32")},
    "negative shape": {"inputs": _described([-1, 6], "float32")},
    "shape of text": {"inputs": _described("ab", "float32")},
    "no inputs": {"inputs": None},
    "inputs of text": {"inputs": {"args": "ab", "kwargs": {}}},
    "a tensor for keywords": {"inputs": {"args": [], "kwargs": {"shape": [2, 6]}}},
    "unknown entry": {"code": "import os"},
    "format": {"format": 2},
    "format of text": {"format": "1"},
    "settings": {"settings": [1]},
    "options": {"settings": {"options": 3}},
    "dropped": {"dropped": {"a": 1}},
    "unknown branch": {"dropped": ["layer"]},
    "fingerprint": {"fingerprint": None},
    "shapes": {"shapes": {"first.weight": [10**12, 10**12]}},
    "deep": {"kept": {"first": [[[[[[1]]]]]]}},
}


@pytest.mark.parametrize("what", few(TAMPERED, *SOME))
def test_a_tampered_plan(what: str, tmp_path: Path) -> None:
    path, model = _saved(tmp_path, **TAMPERED[what]), net()
    with assert_refused(kind=PlanError, model=model):
        depcut.Plan.load(path).apply(model)


RAW_FILES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"a plan",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a text": b'"plan"',
    "truncated": b'{"format": 1, "kept": {"first": [0, 1',
    "deep": b"[" * 100_000,
    "deep and closed": b'{"format": 1, "kept": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a huge number": b'{"format": ' + b"1" * 5000 + b"}",
    "no UTF-8": b"\xff\xfe{}",
    "gzip": b"\x1f\x8b\x08\x00",
    "NUL": b"\x00" * 10,
    "a name twice": b'{"format": 1, "format": 1}',
}


@pytest.mark.parametrize("what", RAW_FILES)
def test_a_file_that_is_no_plan(what: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(RAW_FILES[what])
    with assert_refused("plan", kind=PlanError):
        depcut.Plan.load(path)
    if what != "empty":  # that is a file of options, none of them changed
        with assert_refused():
            depcut.Options.read(path)


@pytest.mark.parametrize("path", [None, 3, b"plan.json", "", "a\0b", "\ud800", Hostile()])
def test_a_path_that_is_none(path: Any) -> None:
    for call in (
        lambda: depcut.Plan.load(path),
        lambda: plan().save(path),
        lambda: depcut.Options.read(path),
        lambda: depcut.export(net(), path, X),
    ):
        with assert_refused(kind=DepcutError):
            call()


def test_a_plan_is_read_from_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    for path in (tmp_path, tmp_path / "fifo", "/dev/zero", tmp_path / "missing" / "plan.json"):
        with assert_refused(kind=PlanError):
            depcut.Plan.load(path)


def test_a_plan_with_unequal_counts_where_they_are_tied(tmp_path: Path) -> None:
    found, path = NETS["chunk_and_chain"], tmp_path / "plan.json"
    model = found.build()
    analysis = depcut.analyze(model, found.inputs(2))
    first, second, *_ = [g.name for g in analysis.groups if g.tied is not None]
    analysis.plan_keeping({first: [0], second: [1]}).save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["kept"][second] = [0, 1]
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PlanError, match="evenly"):
        depcut.Plan.load(path).apply(model)


@pytest.mark.parametrize("what", few(["empty", "a list", "deep", "no UTF-8", "truncated"], "deep"))
def test_a_damaged_checkpoint(what: str, tmp_path: Path) -> None:
    def retrain(resume: bool = True) -> Any:
        return training.retrain(
            net(), pairs(), epochs=1, loss=loss, lr=0.1, checkpoint=tmp_path, progress=False
        )

    retrain()
    for file in tmp_path.rglob("*.json"):
        file.write_bytes(RAW_FILES[what])
    with assert_refused(kind=DepcutError):
        retrain()


# Command line -------------------------------------------------------------------------------------

MODELS = """
import sys
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

def data():
    yield torch.ones(2, 6)
    raise OSError("the disk is gone")

def ends():
    sys.exit(0)

def raises():
    raise ZeroDivisionError

def number():
    return 3

text = "no function"
"""


def run(*arguments: str) -> tuple[Any, str, str]:
    """Exit code, standard output and error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main(arguments)
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the current folder; another that fails is beside it."""
    name = f"raw_models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / "raw_failing.py").write_text("1 / 0", encoding="utf-8")
    (tmp_path / "raw_ending.py").write_text("import sys; sys.exit(0)", encoding="utf-8")
    (tmp_path / "a_file").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    for module in (name, "raw_failing", "raw_ending"):
        sys.modules.pop(module, None)


SHRINK = ("shrink", "{0}:Net", "--ratio", "0.5", "--out", "out")
COMMANDS: dict[str, tuple[str, ...]] = {
    "a seed of -1": (*SHRINK, "--seed", "-1"),
    "a seed of text": (*SHRINK, "--seed", "a"),
    "a huge shape": ("analyze", "{0}:Net", "--input-shape", "100000,100000,1000"),
    "a shape beyond numbers": ("analyze", "{0}:Net", "--input-shape", "9" * 5000),
    "a wrong shape": ("analyze", "{0}:Net", "--input-shape", "2,7"),
    "no shape": ("analyze", "{0}:Net", "--input-shape", "a"),
    "data that fails": (*SHRINK, "--data", "{0}:data"),
    "demo of -1 epochs": ("demo", "--epochs", "-1"),
    "demo of -1 epochs of retraining": ("demo", "--retrain-epochs", "-1"),
    "demo with a seed of -1": ("demo", "--seed", "-1"),
    "demo of ratio 2": ("demo", "--ratio", "2"),
    "demo of ratio nan": ("demo", "--ratio", "nan"),
    "demo of 2 rounds": ("demo", "--rounds", "2"),
    "demo of no threads": ("demo", "--threads", "0"),
    "a ratio of 2": ("shrink", "{0}:raises", "--ratio", "2", "--out", "out"),
    "no module": ("analyze", "no_such_module:net"),
    "no function": ("analyze", "{0}:no_such"),
    "no path": ("analyze", "{0}"),
    "a module that raises": ("analyze", "raw_failing:net"),
    "a module that ends": ("analyze", "raw_ending:net"),
    "a factory that ends": ("analyze", "{0}:ends"),
    "a factory that raises": ("analyze", "{0}:raises"),
    "a factory of a number": ("analyze", "{0}:number"),
    "a text": ("analyze", "{0}:text"),
    "a loss that ends": (*SHRINK, "--loss", "raw_ending:loss"),
    "a loss that is none": (*SHRINK, "--loss", "{0}:text"),
    "no layer": ("analyze", "{0}:Net", "--explain", "9"),
    "no plan": ("export", "{0}:Net", "--plan", "missing.json", "--out", "a.onnx"),
    "no weights": ("analyze", "{0}:Net", "--weights", "missing.safetensors"),
    "weights of another kind": ("analyze", "{0}:Net", "--weights", "a_file"),
    "no options": (*SHRINK, "--options", "missing.toml"),
    "a file for a folder": ("shrink", "{0}:Net", "--ratio", "0.5", "--out", "a_file/out"),
    "no folder": ("export", "{0}:Net", "--out", "missing/a.onnx"),
    "a folder for a file": ("export", "{0}:Net", "--out", "."),
    "no ONNX file": ("bench", "missing.onnx", "--input-shape", "2,6"),
    "a damaged ONNX file": ("bench", "a_file.onnx", "--input-shape", "2,6"),
    "a wrong suffix": ("bench", "a_file", "--input-shape", "2,6"),
    "an unknown option": (*SHRINK, "--speed", "9"),
    "an unknown command": ("prune",),
    "nothing": (),
    "no CPUs": ("bench", "{0}:Net", "--pin", "a,b"),
    "CPU -1": ("bench", "{0}:Net", "--pin", "0,-1"),
    "a batch of 0": ("bench", "{0}:Net", "--batch-size", "0"),
    "a ratio by glob": (*SHRINK, "--ratios", "0=x"),
    "of nothing": (*SHRINK, "--of", "flops"),
}


QUICK = (
    *("a seed of -1", "a huge shape", "data that fails", "demo of -1 epochs", "demo of ratio 2"),
    *("a ratio of 2", "no module", "a module that raises", "a factory that ends", "CPU -1"),
)


@pytest.mark.parametrize("what", few(COMMANDS, *QUICK))
def test_a_wrong_command_ends_with_a_message(what: str, models: str) -> None:
    Path("a_file.onnx").write_bytes(b"no graph")
    code, _, err = run(*(part.format(models) for part in COMMANDS[what]))
    assert code not in (0, None)
    assert err.strip()
    assert "Traceback" not in err
    assert len(err) < 3000


def test_sparse_inputs_are_refused_by_name() -> None:
    model = seeded(Words, 0).a
    with assert_refused("is sparse", "to_dense", model=model):
        depcut.analyze(model, torch.eye(8).to_sparse())
