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


def result_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Size] | None:
    """Shapes of the tensors that a forward returns; None where it does not run without values.

    Args:
        model: The model; a clone of it runs, in eval mode.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    seen = clone(model)
    try:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with capturing(), lean(), fakes as fake, torch.no_grad():

            def stand_in(leaf: Any) -> Any:
                return fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

            held: dict[str, torch.Tensor] = {
                name: fake.from_tensor(tensor)
                for name, tensor in (*seen.named_parameters(), *seen.named_buffers())
            }
            args, kwargs = pytree.tree_map(stand_in, (args, kwargs))
            result = torch.func.functional_call(seen, held, args, kwargs)
        return [leaf.shape for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    except Exception:  # noqa: BLE001  any failure of the user's forward means: not these inputs
        return None


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
