"""Patches of source in every way in which Python code is written around a typed width."""

from __future__ import annotations

import copy
import inspect
import io
import linecache
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import source_nets
import torch
from patch_nets import assert_same, drawn, pair, seeded, zeroed
from torch import Tensor, nn

import depcut
from depcut.errors import DepcutError, InputError, PlanError
from depcut.rewrite.functions import NoSourceError, source_of

pytestmark = pytest.mark.usefixtures("one_thread")

X = drawn(5, 8)
QUICK = {source_nets.ZeroArgumentSuper, source_nets.Private, source_nets.Decorated}
QUICK |= {source_nets.Processed, source_nets.Keywords}


def assert_patched(kind: type[nn.Module], ratio: float = 0.4) -> tuple[Any, Any]:
    slim, dense = pair(seeded(kind), X, ratio)
    assert_same(slim, dense, X)
    assert_same(slim, dense, drawn(8, 8))
    assert slim.a.out_features < 16
    return slim, dense


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.sweep, id=kind.__name__)
        for kind in source_nets.FORMS
    ],
)
def test_form(kind: type[nn.Module]) -> None:
    slim, dense = assert_patched(kind)
    loaded = pickle.loads(pickle.dumps(slim))  # noqa: S301
    assert_same(loaded, dense, drawn(3, 8))


def test_what_the_class_says_of_itself() -> None:
    model = seeded(source_nets.Inherited)
    slim, dense = pair(model, X)
    assert isinstance(slim, source_nets.Inherited)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__bases__"):
        if name != "__bases__":
            assert getattr(type(slim), name) == getattr(type(dense), name)
    assert type(slim).__bases__ == (source_nets.Inherited,)
    assert repr(slim).startswith("Inherited(\n  (a): Linear(in_features=8, out_features=8, ")
    assert inspect.signature(type(slim).mixed) == inspect.signature(type(dense).mixed)
    assert type(slim).mixed.__doc__ == type(dense).mixed.__doc__


def test_the_report_shows_the_difference() -> None:
    slim, _ = pair(seeded(source_nets.Plain), X)
    n = slim.a.out_features
    text = str(depcut.report(slim))
    assert "-    return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)" in text
    assert f"reshape(len(h), {n})" in text
    assert "Plain.mixed" in text
    assert text == str(depcut.report(copy.deepcopy(slim)))


def test_the_original_class_is_untouched() -> None:
    model = seeded(source_nets.OtherWithTheHelper)
    helper, method = source_nets.turned, source_nets.OtherWithTheHelper.mixed
    before = model(X)
    pair(model, X)
    assert source_nets.turned is helper
    assert source_nets.OtherWithTheHelper.mixed is method
    assert torch.equal(model(X), before)


def test_instances_with_different_numbers() -> None:
    halves = [assert_patched(source_nets.HelperFunction, ratio) for ratio in (0.2, 0.6)]
    (a, _), (b, _) = halves
    assert a.a.out_features != b.a.out_features
    assert type(a) is not type(b)
    assert_same(*halves[0], X)


def test_the_same_numbers_give_the_same_class() -> None:
    (a, _), (b, _) = (assert_patched(source_nets.HelperFunction) for _ in range(2))
    assert type(a) is type(b)


@pytest.mark.parametrize(
    "kind", [source_nets.ZeroArgumentSuper, source_nets.Processed, source_nets.OtherWithTheHelper]
)
def test_shrunk_twice(kind: type[nn.Module]) -> None:
    once, _ = assert_patched(kind, 0.25)
    twice, dense = pair(once, X, 0.3)
    assert twice.a.out_features < once.a.out_features < 16
    assert_same(twice, dense, drawn(3, 8))
    loaded = pickle.loads(pickle.dumps(twice))  # noqa: S301
    assert_same(loaded, dense, drawn(3, 8))
    assert_same(once, copy.deepcopy(once), X)


def test_a_class_made_by_a_function() -> None:
    kind = source_nets.closed_over(2.5)
    slim, dense = assert_patched(kind)
    assert_same(copy.deepcopy(slim), dense, X)
    with pytest.raises(Exception, match="local") as wanted:
        pickle.dumps(dense)
    with pytest.raises(type(wanted.value), match="local"):
        pickle.dumps(slim)


def test_a_hook_that_takes_an_argument_of_every_subclass() -> None:
    slim, _ = assert_patched(source_nets.RegisteredNet)
    assert type(slim).kind == "net"


def test_a_metaclass_that_makes_no_further_class() -> None:
    class Final(type):
        def __new__(mcs, name: str, bases: Any, namespace: Any) -> Any:
            if any(isinstance(base, Final) for base in bases):
                raise KeyError("one is enough")
            return super().__new__(mcs, name, bases, namespace)

    class Only(source_nets.Plain, metaclass=Final):
        def mixed(self, h: Tensor) -> Tensor:
            return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)

    model = seeded(Only)
    slim = depcut.shrink(model, 0.4, X, align=1)
    [why] = depcut.report(slim).generated.values()
    assert "one is enough" in why
    with pytest.raises(InputError, match="captured with"):
        slim(drawn(8, 8))


CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        h = torch.tanh(self.a(x)).view(x.shape[0], 4, 4)
        return self.b(h.flip(1).reshape(x.shape[0], 16))
"""


def test_a_class_without_source() -> None:
    namespace: dict[str, Any] = {"__name__": "nowhere"}
    exec(CODE, namespace)
    model = seeded(namespace["Net"])
    plan = depcut.analyze(model, X).plan(0.4, align=1)
    dense = zeroed(model, plan.tensor_indices())
    slim = plan.apply(dense)
    assert list(depcut.report(slim).generated) == [""]
    assert "not at hand" in depcut.report(slim).generated[""]
    assert_same(slim, dense, drawn(8, 8))


def imported(path: Path) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


CHANGES = {
    "a line above": lambda text: "# new\n" + text,
    "another number": lambda text: text.replace("4, 4", "2, 8"),
    "another line in the method": lambda text: text.replace(
        "        return", "        pass\n        return"
    ),
    "another operator": lambda text: text.replace("flip(1)", "flip(2)"),
    "no longer there": lambda text: "import torch\n",
    "no longer Python": lambda text: "((\n" + text,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_changed_since_it_was_imported(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "changing_net.py"
    path.write_text(CODE)
    try:
        module = imported(path)
        path.write_text(change(CODE))
        linecache.checkcache()
        model = seeded(module.Net)
        plan = depcut.analyze(model, X).plan(0.4, align=1)
        dense = zeroed(model, plan.tensor_indices())
        slim = plan.apply(dense)
        [why] = depcut.report(slim).generated.values()
        assert re.search("not what runs|not where its code says it is", why), why
        assert_same(slim, dense, X)
        assert_same(slim, dense, drawn(8, 8))
    finally:
        sys.modules.pop("changing_net", None)


def test_a_pickle_of_code_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "changing_net.py"
    path.write_text(CODE)
    try:
        slim = depcut.shrink(seeded(imported(path).Net), 0.4, X, align=1)
        data = pickle.dumps(slim)
        path.write_text(CODE.replace("4, 4", "2, 8"))
        linecache.checkcache()
        imported(path)
        with pytest.raises(PlanError, match=r"Net\.forward is not the function that was patched"):
            pickle.loads(data)  # noqa: S301
    finally:
        sys.modules.pop("changing_net", None)


def test_another_processor_than_in_the_example_is_refused() -> None:
    slim, dense = assert_patched(source_nets.Processed)
    slim.processor = dense.processor = source_nets.Processor(7.0)
    assert_same(slim, dense, X)
    slim.processor = lambda _owner, h: h
    with pytest.raises(InputError, match="lambda"):
        slim(X)


class Either(source_nets.Base):
    """One expression calls two functions, one of which types a width in."""

    def mixed(self, h: Tensor) -> Tensor:
        for function in (source_nets.turned, torch.tanh, doubled):
            h = function(h)
        return h


def doubled(h: Tensor) -> Tensor:
    return h * 2


def test_one_expression_calls_several_functions() -> None:
    assert_patched(Either)


class Several(nn.Module):
    """A block whose one line needs another number for each of two instances."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh().view(len(x), 4, 4)
        return self.b(h.flip(1).reshape(len(x), 16))


def test_each_instance_has_its_own_numbers() -> None:
    model = seeded(Several)
    analysis = depcut.analyze(model, X)
    small, *_ = [g for g in analysis.groups if g.size > 1 and "blocks.0" in str(g.name)]
    plan = analysis.plan_keeping({small.name: [0, 2]})
    dense = zeroed(model, plan.tensor_indices())
    slim = plan.apply(dense)
    assert list(depcut.report(slim).patched) == ["blocks.0"]
    assert type(slim.blocks[1]) is Block
    assert_same(slim, dense, drawn(3, 8))


@pytest.mark.sweep
def test_a_class_in_the_main_script(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    body = """
    if __name__ == "__main__":
        import copy, pickle, depcut
        torch.manual_seed(0)
        x = torch.randn(5, 8)
        slim = depcut.shrink(Net().eval(), 0.4, x, align=1)
        assert depcut.report(slim).patched and not depcut.report(slim).generated
        y = torch.randn(3, 8)
        for made in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
            assert torch.equal(made(y), slim(y))
    """
    script.write_text(CODE + textwrap.dedent(body))
    root = str(Path(depcut.__file__).parent.parent)
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script)], check=True, env=environment, timeout=300)


def test_no_source_is_said_by_name() -> None:
    with pytest.raises(NoSourceError, match="not at hand"):
        source_of(compile("0", "<nowhere>", "eval"))
    assert not issubclass(NoSourceError, DepcutError)  # never reaches a caller


def test_torch_save_keeps_two_instances_apart() -> None:
    pairs = [assert_patched(source_nets.Plain, ratio) for ratio in (0.2, 0.6)]
    file = io.BytesIO()
    torch.save([slim for slim, _ in pairs], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert len(loaded) == 2
    for made, (_, dense) in zip(loaded, pairs, strict=True):
        assert_same(made, dense, drawn(3, 8))


class Limited(nn.Module):
    """One attribute is a width, and the longest sequence; [B, L, 8] to [B, min(L, 16), 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(8, 16), nn.Linear(16, 5), 16

    def forward(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        h = self.a(x).tanh().view(b, length, 4, self.n // 4).flip(2).reshape(b, length, self.n)
        if length > self.n:
            h = h[:, : self.n]
        return self.b(h)


@pytest.mark.parametrize("length", [6, 12, 20])
def test_a_width_that_is_compared_with_a_length(length: int) -> None:
    slim, dense = pair(seeded(Limited), drawn(2, 6, 8))
    assert slim.n == 16
    assert slim.a.out_features == 8
    assert_same(slim, dense, drawn(2, length, 8))


class Checked(Limited):
    """The attribute is compared with the width that it is."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if h.shape[-1] != self.n:
            raise ValueError(h.shape)
        return self.b(h.reshape(*x.shape[:2], self.n))


def test_a_width_that_is_compared_with_itself() -> None:
    slim = depcut.shrink(seeded(Checked), 0.4, drawn(2, 6, 8), align=1)
    assert slim.n == slim.a.out_features < 16
    assert not depcut.report(slim).patched
    assert slim(drawn(3, 20, 8)).shape == (3, 20, 5)
