"""Structural clones: a module tree with its plain Python state copied and its tensors shared.

What is captured, exported, timed or run for a check is a clone, so that whatever this leaves behind
(fake parameters, filled caches, counters, hooks, modes) is left in an object that nobody else sees.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import nn

from depcut.capture.copier import Copier
from depcut.support.torch_private import make_subclass

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Clones(Copier):
    """Copies a module tree and shares its tensors; buffers are copied by value if asked for."""

    def __init__(
        self,
        *,
        buffers: bool = False,
        requires_grad: bool | None = None,
        memo: dict[int, Any] | None = None,
    ) -> None:
        super().__init__(memo)
        self._buffers, self._requires_grad = buffers, requires_grad

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or the values of one that a forward may write to."""
        lazy = nn.parameter.is_lazy(value)  # a forward gives it a shape
        if isinstance(value, nn.Parameter) and not lazy:
            return value if self._requires_grad is None else self._stand_in(value)
        if not (self._buffers or lazy):
            return value
        if not value.is_leaf:
            return value.detach().clone()
        copied: torch.Tensor = copy.deepcopy(value, self.memo)  # views of one storage stay that
        return copied

    def _stand_in(self, value: nn.Parameter) -> torch.Tensor:
        """A parameter with the memory of another, but with flag and gradient of its own."""
        needed = bool(self._requires_grad) and value.is_floating_point()
        parameter: torch.Tensor = make_subclass(type(value), value.detach(), needed)
        parameter.__dict__.update(vars(value))
        return parameter

    def follows(self, value: Any) -> bool:  # noqa: ARG002
        """True: a function gets its own copy of every value that it closes over."""
        return True

    def as_its_class_says(self, kind: type) -> bool:  # noqa: ARG002
        """False: a forward may need state that a class leaves out when it is pickled."""
        return False


def clone(
    model: ModuleT,
    *,
    buffers: bool = False,
    requires_grad: bool | None = None,
    training: Collection[str] | None = (),
    memo: dict[int, Any] | None = None,
) -> ModuleT:
    """A module tree with its plain Python state copied and its tensors shared.

    Args:
        model: The model; it is only read.
        buffers: Whether buffers and other tensors that are no parameters are copied by value, for
            runs with values.
        requires_grad: Of parameters that stand for the model's and share their memory: whether they
            are to be differentiated (where they are floating-point); None: the model's own.
        training: Names of the modules that are in training mode, all others in eval mode; None:
            as they are.
        memo: What stands for some objects of the model, by their id; grows.
    """
    cloned: ModuleT = _Clones(buffers=buffers, requires_grad=requires_grad, memo=memo)(model)
    if training is not None:
        chosen = {id(m) for name, m in cloned.named_modules() if name in training}
        for module in cloned.modules():
            module.training = id(module) in chosen
    return cloned


def cloned_arguments(arguments: Any) -> Any:
    """Structural copies of a forward's arguments: containers and objects that it may change.

    Args:
        arguments: Anything; tensors are shared.
    """
    return _Clones()(arguments)
