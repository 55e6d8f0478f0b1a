"""Functions, helpers and hooks that reach a layer by a way of their own: the copy's, or refused."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from selection import sampled
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.errors import VerificationError


class Net(nn.Module):
    """A layer `fc` that the forward reaches through `act`, and one that shrinks in any case."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.fc, self.b = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.c, self.act = nn.Linear(16, 4), torch.relu
        self.register_buffer("scale", torch.rand(16))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.act(self.a(x)))))

    def method(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def hook(self, _module: Any, _args: Any, out: Tensor) -> Tensor:
        return self.fc(out)


class Helper:
    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, x: Tensor) -> Tensor:
        return self.owner.fc(x)


class Slotted(Helper):
    __slots__ = ()


def with_act(make: Callable[[Net], Any]) -> Net:
    model = Net()
    model.act = make(model)
    return model


def of_list(model: Net) -> Any:
    layers = [model.fc]
    return lambda x: layers[0](x).tanh()


def of_helper(model: Net) -> Any:
    helper = Helper(model)
    return lambda x: helper(x).tanh()


def of_weak(model: Net) -> Any:
    owner = weakref.ref(model)
    return lambda x: owner().fc(x).tanh()


def of_proxy(model: Net) -> Any:
    owner = weakref.proxy(model)
    return lambda x: owner.fc(x).tanh()


def of_parameters(model: Net) -> Any:
    weight, rest = model.fc.weight, {"bias": model.fc.bias}
    return lambda x: functional.linear(x, weight, **rest)


def of_buffer(model: Net) -> Any:
    scale = model.scale
    return lambda x: model.fc(x * scale)


ACTS: dict[str, Callable[[Net], Any]] = {
    "a lambda over self": lambda m: lambda x: m.fc(x).tanh(),
    "a default": lambda m: lambda x, fc=m.fc: fc(x).tanh(),
    "a keyword default": lambda m: lambda x, *, fc=m.fc: fc(x).tanh(),
    "a list": of_list,
    "a helper": of_helper,
    "a weak reference": of_weak,
    "a proxy": of_proxy,
    "parameters": of_parameters,
    "a buffer": of_buffer,
    "partial": lambda m: functools.partial(lambda owner, x: owner.fc(x), m),
    "partial over parameters": lambda m: functools.partial(
        functional.linear, weight=m.fc.weight, bias=m.fc.bias
    ),
    "a bound method": lambda m: m.method,
    "a layer's forward": lambda m: m.fc.forward,
    "an object": Helper,
    "a method of an object": lambda m: Slotted(m).__call__,
}


def with_forward(make: Callable[[Net], Any]) -> Net:
    model = Net()
    model.forward = make(model)
    return model


def of_self(model: Net, x: Tensor) -> Tensor:
    return model.c(model.fc(model.a(x)))


def wrapping(model: Net) -> Any:
    before = model.forward

    @functools.wraps(before)
    def forward(x: Tensor) -> Tensor:
        return before(x) + model.c(model.fc(model.a(x)))

    return forward


FORWARDS: dict[str, Callable[[Net], Any]] = {
    "a method type": lambda m: types.MethodType(of_self, m),
    "partial": lambda m: functools.partial(of_self, m),
    "a lambda": lambda m: lambda x: of_self(m, x),
    "a wrapper": wrapping,
}


def with_hook(hook: Callable[[Net], Any]) -> Net:
    model = Net()
    model.a.register_forward_hook(hook(model))
    return model


def hook_of_list(model: Net) -> Any:
    owners = [model]
    return lambda *given: owners[0].hook(*given).tanh()


HOOKS: dict[str, Callable[[Net], Any]] = {
    "a bound method": lambda m: m.hook,
    "a closure": lambda m: lambda _module, _args, out: m.fc(out),
    "a list": hook_of_list,
}

NETS: dict[str, Callable[[], Net]] = {
    **{f"act: {name}": functools.partial(with_act, make) for name, make in ACTS.items()},
    **{f"forward: {name}": functools.partial(with_forward, f) for name, f in FORWARDS.items()},
    **{f"hook: {name}": functools.partial(with_hook, make) for name, make in HOOKS.items()},
}


QUICK = ("act: a keyword default", "act: a list", "act: a proxy", "act: parameters", "hook: a list")


def sees(model: nn.Module, changed: nn.Module, x: Tensor) -> bool:
    """Whether a model's output follows a change of another one's `fc`."""
    with torch.no_grad():
        before, weight = model(x).clone(), changed.fc.weight.clone()
        changed.fc.weight += 1.0
        after = model(x)
        changed.fc.weight.copy_(weight)
    return not torch.equal(before, after)


@pytest.mark.parametrize("name", sampled(list(NETS), QUICK))
def test_a_layer_that_is_reached_by_another_way_is_the_copys(name: str) -> None:
    model, x = NETS[name](), torch.randn(3, 6)
    slim = depcut.shrink(model, 0.5, x)
    assert type(slim) is Net
    assert sees(slim, slim, x)
    assert not sees(slim, model, x)
    assert not sees(model, slim, x)


FAR: Any = None


def far(x: Tensor) -> Tensor:
    return FAR.fc(x)


def of_class(model: Net) -> Any:
    class Inner:
        def __call__(self, x: Tensor) -> Tensor:
            return model.fc(x)

    return Inner()


@pytest.mark.parametrize("make", [lambda _: far, of_class], ids=["a global", "a class"])
def test_what_cannot_be_bound_to_the_copy_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = with_act(make), torch.randn(3, 6)
    monkeypatch.setitem(globals(), "FAR", model)
    with pytest.raises(VerificationError, match=r"made from: fc\.bias, fc\.weight"):
        depcut.shrink(model, 0.2, x, ignore=("a", "fc"))
