"""Smaller models to store, and what says that a loaded one is the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from patch_nets import Heads, drawn, seeded
from torch import Tensor, nn

import depcut

X = drawn(3, 6, 8)


@functools.cache
def slim_of(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    """A model without 40 % of its MACs, shared by the tests of a process."""
    return depcut.shrink(seeded(make).eval(), 0.4, x, align=1)


def heads() -> nn.Module:
    """A copy of a patched net, so that no test sees what another one did."""
    return copy.deepcopy(slim_of(Heads, X))


def assert_same_model(loaded: nn.Module, slim: nn.Module, x: Tensor) -> None:
    assert [type(m) for m in loaded.modules()] == [type(m) for m in slim.modules()]
    assert [m.training for m in loaded.modules()] == [m.training for m in slim.modules()]
    assert str(depcut.report(loaded)) == str(depcut.report(slim))
    for held in ("parameters", "buffers"):
        wanted = dict(getattr(slim, f"named_{held}")(remove_duplicate=False))
        got = dict(getattr(loaded, f"named_{held}")(remove_duplicate=False))
        assert list(got) == list(wanted)
        for name, tensor in wanted.items():
            assert got[name].dtype == tensor.dtype
            assert got[name].stride() == tensor.stride()
            assert got[name].requires_grad == tensor.requires_grad
            assert torch.equal(got[name], tensor), name
        same = [[a is b for b in wanted.values()] for a in wanted.values()]
        assert [[a is b for b in got.values()] for a in got.values()] == same
    assert list(loaded.state_dict()) == list(slim.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(x), slim(x))
