"""Shapes of what is computed element by element, without what torch computes them by.

With an open batch, torch derives the shape of a ReLU6 or a batch norm from those of a dozen other
operators, each of which compares symbolic sizes. It is their input's. Only where that is plain
(floating-point numbers, laid out row by row) is it taken to be so; torch computes all others.
"""

from __future__ import annotations

from typing import Any

import torch

from depcut.support.torch_private import EVALUATED_BATCH_NORM, FakeTensor

# Of one tensor and numbers; floating-point inputs give results of their type.
_NAMES = (
    "elu exp gelu hardsigmoid hardswish hardtanh leaky_relu mish relu sigmoid silu softplus tanh"
).split()


def _overloads(names: list[str]) -> frozenset[Any]:
    found = (getattr(torch.ops.aten, name, None) for name in names)
    return frozenset(each.default for each in found if each is not None)


_ALONE = _overloads(_NAMES)
_IN_PLACE = _overloads([f"{name}_" for name in _NAMES])
_KNOWN = _ALONE | _IN_PLACE | {EVALUATED_BATCH_NORM}


def shaped_as_input(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns that has its input's shape; None where torch is to compute it.

    Args:
        mode: The mode of fake tensors that it is called in.
        func: The operator.
        args: That it is called with.
        kwargs: That it is called with.
    """
    if func not in _KNOWN or not _is_plain(mode, args):
        return None
    x, others = args[0], (*args[1:], *kwargs.values())
    if func in _IN_PLACE:
        return None if _tensors(others) else x
    if not _is_row_by_row(x):
        return None
    if func in _ALONE:
        return None if _tensors(others) else _alike(mode, x)
    if x.device.type != "cpu" or any(type(t) is not FakeTensor for t in _tensors(others)):
        return None
    with mode:
        statistics = [torch.empty((0,), dtype=x.dtype, device=x.device) for _ in range(2)]
    return _alike(mode, x), *statistics


def _is_plain(mode: Any, args: Any) -> bool:
    """Whether the first argument is a fake tensor of floating-point numbers that no one knows."""
    x = args[0] if args else None
    return (
        type(x) is FakeTensor
        and x.fake_mode is mode
        and x.constant is None
        and x.dtype.is_floating_point
        and x.layout is torch.strided
        and not x.is_nested
    )


def _is_row_by_row(x: torch.Tensor) -> bool:
    """Whether the elements lie in the order of their indices, and no other order is the same."""
    expected = 1
    for number, (size, stride) in enumerate(zip(x.shape[::-1], x.stride()[::-1], strict=True)):
        if type(stride) is not int or stride != expected:
            return False
        if number == x.ndim - 1:
            return True
        if type(size) is not int or size < 2:
            return False
        expected *= size
    return False


def _alike(mode: Any, x: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]
