"""Whether a smaller model computes with tensors of its own alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from depcut.capture.clone import clone
from depcut.capture.held import held_tensors
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError, listed
from depcut.plan.keep import Keep
from depcut.reference.run import example
from depcut.support.torch_private import pytree


class _Arguments(TorchFunctionMode):
    """Notes which tensors of another model are passed to an operator.

    Args:
        held: Those tensors, by name.
    """

    def __init__(self, held: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {_storage(t): name for name, t in held.items() if _storage(t)}
        self.seen: set[str] = set()

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) in self._names:
                self.seen.add(self._names[_storage(leaf)])
        return function(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


@preserved()
def check_own_tensors(slim: nn.Module, model: nn.Module, keep: Keep) -> None:
    """Refuse a smaller model whose code computes with tensors of the model it was made from.

    What a global variable or a class refers to cannot be bound to a copy.

    Args:
        slim: The smaller model, which runs.
        model: The dense model.
        keep: What stays.

    Raises:
        VerificationError: It would train, or follow the training of, a model that is not its own.
    """
    if not keep.coupling.program.around:
        return
    args, kwargs = example(keep, rows=1)
    with torch.no_grad(), _Arguments(held_tensors(model)) as watch:
        clone(slim, buffers=True)(*args, **kwargs)
    if watch.seen:
        raise VerificationError(
            "the code of the smaller model computes with tensors of the model it was made from: "
            f"{listed(sorted(watch.seen))}",
            where=type(model).__name__,
            remedy="a function or a class refers to the model by a global variable or from "
            "outside: let it get the module as an argument, or make it a method",
        )
