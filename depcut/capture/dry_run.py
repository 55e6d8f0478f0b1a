"""Whether a forward runs on some inputs, and its results' shapes: without values if it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.flags import flags_as_before
from depcut.capture.lean import lean
from depcut.capture.process_state import capturing, quiet
from depcut.capture.random_state import preserved
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import FakeTensorMode, pytree


class StandIns:
    """Tensors without values, for several runs: one for each tensor that they share."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the first keeps its number

    def of(self, leaf: Any) -> Any:
        """The one for a tensor; anything else as it is."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in self._made:
            self._made[id(leaf)] = leaf, self.mode.from_tensor(leaf)
        return self._made[id(leaf)][1]


def dry_result(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_ins: StandIns | None = None,
) -> tuple[Any] | None:
    """What a forward returns, without values, in a tuple; None where it does not run so.

    Args:
        model: The model; a clone of it runs, in eval mode.
        args: Positional inputs.
        kwargs: Keyword inputs.
        stand_ins: Those of other runs.
    """
    seen = clone(model)
    made = stand_ins or StandIns()
    try:
        with capturing(), lean(), made.mode, torch.no_grad():
            tensors = (*seen.named_parameters(), *seen.named_buffers())
            held: dict[str, torch.Tensor] = {name: made.of(tensor) for name, tensor in tensors}
            args, kwargs = pytree.tree_map(made.of, (args, kwargs))
            return (torch.func.functional_call(seen, held, args, kwargs),)
    except Exception:  # noqa: BLE001  any failure of the user's forward means: not these inputs
        return None


def result_shapes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_ins: StandIns | None = None,
) -> list[torch.Size] | None:
    """Shapes of the tensors that a forward returns; None where it does not run without values.

    Args:
        model: The model; a clone of it runs, in eval mode.
        args: Positional inputs.
        kwargs: Keyword inputs.
        stand_ins: Those of other runs.
    """
    found = dry_result(model, args, kwargs, stand_ins)
    leaves = pytree.tree_leaves(found)
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return None if found is None else shapes


def failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a forward does not run on some inputs, with values where it asks for them; "" if it does.

    Args:
        model: The model; clones of it run, in eval mode.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    if result_shapes(model, args, kwargs) is not None:
        return ""
    seen = clone(model, buffers=True)
    given, keywords = cloned_arguments((args, kwargs))
    try:
        with preserved(), flags_as_before(), quiet(), torch.no_grad():
            seen(*given, **keywords)
    except Exception as error:  # noqa: BLE001  whatever the user's forward raises
        reraise_fatal(error)
        return first_line(error)
    return ""
