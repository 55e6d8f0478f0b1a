"""Nothing of the caller's changes, in no thread: the model, what it caches, the process."""

from __future__ import annotations

import gc
import logging
import math
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.capture import process_state
from depcut.capture.capture import capture
from depcut.capture.inputs import infer_inputs
from depcut.errors import CaptureError, ExportError
from depcut.support.torch_private import replaced_by_export, replaced_to_be_lean

# Models that leave things behind -----------------------------------------------------------------


class Helper:
    """No module, but with a memory, as caches of keys and values have."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}
        self.calls = 0

    def table(self, size: int) -> Tensor:
        self.calls += 1
        if size not in self.seen:
            self.seen[size] = torch.arange(size, dtype=torch.float32)
        return self.seen[size]


class Caching(nn.Module):
    """Remembers in a dictionary, a list, a helper, a new attribute, a counter, and in its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 3)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.cache: dict[int, Tensor] = {}
        self.notes: list[Tensor] = []
        self.helper = Helper()
        self.calls = 0
        self.shape: tuple[int, ...] | None = None
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.lookup = self.helper.table
        self.first.register_forward_hook(self._note)
        self.first.register_forward_hook(lambda _m, _a, y: y * self.scale())

    def scale(self) -> float:
        return 1.0 + self.head.out_features * 0.0

    def _note(self, _module: nn.Module, _args: Any, result: Tensor) -> None:
        self.latest = result

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        if self.shape != x.shape[1:]:
            self.anchors, self.shape = torch.ones(x.shape[1]), tuple(x.shape[1:])
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.arange(x.shape[1], dtype=torch.float32)
        y = self.second(functional.relu(self.first(x + self.cache[x.shape[1]] * self.anchors)))
        self.notes.append(y)
        return self.head(self.norm(y + self.lookup(y.shape[1]) + self.helper.table(y.shape[1])))


class Image(nn.Module):
    """Convolutions, which other kernels compute while torch.export is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Twice(nn.Module):
    """One layer under two names: torch.export wraps modules then."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.once, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.again = self.once

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(functional.relu(self.once(self.stem(x)))))


class Attention(nn.Module):
    """Fused attention, and torch's encoder, which has a path for inference alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], 3, 2, 4)
        q, k, v = self.qkv(self.encoder(x)).view(shape).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.head(y.transpose(1, 2).flatten(2))


class Draws(Caching):
    """Draws random numbers, too, which nothing depends on."""

    def forward(self, x: Tensor) -> Tensor:
        self.drawn = random.random(), np.random.rand(), torch.rand(2)  # noqa: NPY002
        return super().forward(x)


class Fails(Draws):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("of the model", stacklevel=1)
        raise ValueError(str(super().forward(x).shape))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (Image, (2, 3, 16, 16)),
    "shared layers": (Twice, (2, 8)),
    "attention": (Attention, (2, 16, 8)),
    "caches": (Caching, (2, 8)),
}
DRAWS = {"caches and draws": (Draws, (2, 8))}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kind, shape = {**MODELS, **DRAWS}[name]
    return kind().eval(), torch.randn(shape)


# What must stay ----------------------------------------------------------------------------------


def everything(model: nn.Module) -> dict[str, Any]:
    """All attributes of all modules by identity, containers and helpers with what they hold."""
    found: dict[str, Any] = {}

    def note(place: str, value: Any) -> None:
        found[place] = (id(value), type(value))
        if isinstance(value, Tensor):
            found[place] += (value._version, value.detach().clone().tolist())
        elif isinstance(value, dict):
            found[place] += (list(value),)
            for key, item in value.items():
                note(f"{place}[{key!r}]", item)
        elif isinstance(value, list | tuple):
            found[place] += (len(value),)
            for key, item in enumerate(value):
                note(f"{place}[{key}]", item)
        elif isinstance(value, int | float | str):
            found[place] += (value,)
        elif isinstance(value, Helper):
            note(f"{place}.", vars(value))

    for name, module in model.named_modules():
        note(name, vars(module))
    return found


def process() -> dict[str, Any]:
    """What belongs to the process."""
    fast = torch.backends.mha.get_fastpath_enabled()
    return {
        "sqrt": math.sqrt,
        "fast path": (fast, type(fast)),
        "compiling": (torch.compiler.is_compiling(), torch.compiler.is_exporting()),
        "kernels": (torch.backends.mkldnn.flags, torch._C._get_mkldnn_enabled()),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "module": (nn.Module.__call__, nn.Module.__getattr__),
        "export": [getattr(o, n) for o, n in replaced_by_export().values()],
        "lean export": [getattr(o, n) for o, n in replaced_to_be_lean().values()],
        "logging": logging.root.manager.disable,
        "handlers": [(h, list(h.filters)) for h in logging.root.handlers],
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "stderr": sys.stderr,
        "garbage": gc.isenabled(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    }


@contextmanager
def nothing_changes(model: nn.Module | None = None) -> Iterator[None]:
    """Neither the process nor the model is another afterwards, deep inside."""
    before = process()
    inside = everything(model) if model is not None else {}
    outside = snapshot(model) if model is not None else {}
    yield
    after = process()
    assert {k: after[k] for k in after if after[k] != before[k]} == {}
    if model is not None:
        now = everything(model)
        assert {
            k: (inside.get(k), now.get(k)) for k in {*inside, *now} if inside.get(k) != now.get(k)
        } == {}
        assert_untouched(model, outside)


def bench(model: nn.Module, x: Tensor, folder: Path) -> None:
    depcut.bench({"model": model}, x, runtime="torch", rounds=6, warmup=0)


USES: dict[str, Callable[[nn.Module, Tensor, Path], Any]] = {
    "analyze": lambda model, x, _: depcut.analyze(model, x),
    "shrink": lambda model, x, _: depcut.shrink(model, 0.4, x, align=1),
    "shrink on data": lambda model, x, _: depcut.shrink(model, 0.4, data=[x, -x], align=1),
    "shrink by gradients": lambda model, x, _: depcut.shrink(
        model, 0.4, data=[(x, None)], loss=lambda y, _: y.square().mean(), score="hessian", align=1
    ),
    "export": lambda model, x, folder: depcut.export(model, folder / "model.onnx", x),
    "bench": bench,
    "compact": lambda model, x, _: depcut.compaction(model, x),
    "compare": lambda model, x, _: depcut.compare(model, model, x, runtime=None),
    "distance": lambda model, x, _: depcut.training.output_distance(model, model, [x]),
    "inference of inputs": lambda model, x, _: infer_inputs(model),
}


@pytest.mark.parametrize("use", USES)
def test_a_model_that_caches_is_untouched(use: str, tmp_path: Path) -> None:
    model, x = made("caches and draws")
    model.train()
    model.first.eval()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    with nothing_changes(model):
        USES[use](model, x, tmp_path)
    assert not hasattr(model, "anchors")
    assert model.calls == 0


@pytest.mark.parametrize("use", ["shrink", "export", "bench"])
def test_what_was_cached_before_stays(use: str, tmp_path: Path) -> None:
    model, x = made("caches")
    with torch.no_grad():
        wanted = model(x)
    with nothing_changes(model):
        USES[use](model, x, tmp_path)
    assert model.calls == 1
    with torch.no_grad():
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("use", ["analyze", "export", "inference of inputs"])
def test_nothing_changes_when_the_forward_raises(use: str, tmp_path: Path) -> None:
    model, x = Fails(), torch.randn(2, 8)
    with nothing_changes(model), pytest.raises((CaptureError, ExportError, depcut.InputError)):
        USES[use](model, x, tmp_path)


def test_distillation_leaves_the_teacher_alone() -> None:
    model, x = made("caches")
    plan = depcut.analyze(model, x).plan(0.4, align=1)
    slim = plan.apply(model)
    with (
        nothing_changes(model),
        depcut.training.Distillation(model, slim, plan, hidden=("first",)) as loss,
    ):
        first = loss(slim(x), x)
    assert torch.isfinite(first)
    with depcut.training.Distillation(model, slim, plan) as loss, torch.no_grad():
        before = loss(slim(x), x)
        model.head.weight.add_(1.0)  # the clone shares it
        after = loss(slim(x), x)
        model.head.bias = nn.Parameter(model.head.bias + torch.arange(3.0))
        replaced = loss(slim(x), x)
    assert len({float(before), float(after), float(replaced)}) == 3


# Real threads ------------------------------------------------------------------------------------


@contextmanager
def served(model: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """Another thread serves the model meanwhile; what it got that is not bit by bit right."""
    with torch.no_grad():
        wanted = model(x)
    wrong: list[Any] = []
    times = [0]
    stop = threading.Event()

    def serve() -> None:
        try:
            with torch.no_grad():
                while not stop.wait(5e-4):
                    got = model(x)
                    times[0] += 1
                    if type(got) is not Tensor or not torch.equal(got, wanted):
                        wrong.append(got)
                    if math.sqrt(times[0]) ** 2 == 0 or torch.compiler.is_compiling():
                        wrong.append("a state of the other thread")
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            wrong.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join()
    assert times[0] > 10


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_served_while_it_is_captured(name: str) -> None:
    model, x = made(name)
    before = process()
    with served(model, x) as wrong:
        for _ in range(5):
            program = capture(model, x)
    assert wrong == []
    assert process() == before
    # Calls of the other thread are in no layer of ours.
    modules = dict(model.named_modules())
    assert {call.module for call in program.calls} <= set(modules)
    assert len(program.calls) == len(capture(model, x).calls)


@pytest.mark.parametrize(
    "name", ["caches", *(pytest.param(n, marks=pytest.mark.sweep) for n in MODELS if n != "caches")]
)
def test_a_model_is_served_while_it_shrinks_and_is_exported(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    before = process()
    with served(model, x) as wrong:
        slims = [depcut.shrink(model, 0.4, x, align=1) for _ in range(2)]
        depcut.export(model, tmp_path / "model.onnx", x)
    assert wrong == []
    assert process() == before
    first, second = (s.state_dict() for s in slims)
    assert all(torch.equal(first[k], second[k]) for k in first if k != "count")


@pytest.mark.parametrize("names", [("convolutions", "shared layers"), ("caches", "caches")])
def test_two_threads_shrink_at_once(names: tuple[str, str]) -> None:
    models = {name: made(name) for name in names}
    alone = {n: depcut.shrink(m, 0.4, x, align=1) for n, (m, x) in models.items()}
    before = process()
    results: list[Any] = [None, None]
    ready = threading.Barrier(2)

    def work(place: int, name: str) -> None:
        model, x = models[name]
        try:
            ready.wait()
            results[place] = depcut.shrink(model, 0.4, x, align=1)
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            results[place] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process() == before
    for name, slim in zip(names, results, strict=True):
        assert isinstance(slim, nn.Module), slim
        wanted = alone[name].state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in slim.state_dict().items())
    for name, slim in zip(names, results, strict=True):
        x = models[name][1]
        assert torch.equal(slim.eval()(x), alone[name].eval()(x))


def test_only_the_capturing_thread_is_silent(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    log = logging.getLogger("a.library")

    def speak(who: str) -> None:
        sys.stderr.write(f"printed by {who}\n")
        log.warning("logged by %s", who)
        try:
            warnings.warn(f"warned by {who}", stacklevel=1)
        except UserWarning as warning:  # they are errors in this suite
            heard.append(str(warning))

    with process_state.quiet():
        speak("the capture")
        other = threading.Thread(target=speak, args=("another",))
        other.start()
        other.join()
    assert capsys.readouterr().err == "printed by another\n"
    assert caplog.messages == ["logged by another"]
    assert heard == ["warned by another"]


def test_flags_of_one_thread_are_bools_in_expressions() -> None:
    before = torch.compiler.is_exporting()
    found: list[Any] = []

    def read() -> None:
        flags = torch.compiler.is_exporting(), torch.backends.mha.get_fastpath_enabled()
        for flag in flags:
            tracing = False
            tracing |= flag  # as transformers does
            results = (tracing, flag | False, flag & True, True ^ flag, flag == True, not flag)  # noqa: E712
            assert all(type(r) is bool for r in results)
            assert int(flag) == hash(flag) == [0, 1][flag]
            found.append(tracing)

    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            read()
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
            return super().forward(x)

    capture(nn.Sequential(Reads(3, 3), nn.Linear(3, 3)), torch.ones(2, 3))
    fast = torch.backends.mha.get_fastpath_enabled()
    assert found == [True, False, before, fast]


def test_states_that_several_threads_ask_for_end_with_the_last() -> None:
    enabled = torch.backends.cuda.flash_sdp_enabled()
    first, second = process_state.formula_attention(), process_state.formula_attention()
    with process_state.uncollected():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not gc.isenabled()
        second.__exit__(None, None, None)
    assert torch.backends.cuda.flash_sdp_enabled() == enabled
    assert gc.isenabled()
