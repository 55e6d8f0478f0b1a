"""What a recurrent layer returns, without its steps.

For the shapes of a recurrent layer torch runs it on tensors without values, step by step: a minute
for a net of such layers, and as much longer as its inputs are. All steps are alike, so one is run,
with all that it checks, and its result repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from depcut.support.torch_private import FakeTensor, proxy_tensor

Layer = Callable[..., tuple[torch.Tensor, Any]]


def of_one_step(plain: Layer) -> Layer:
    """In place of a function that runs a layer over all steps: one that runs the first of them.

    Args:
        plain: Of inputs [time, batch, features] and of more that has no time; what it returns first
            is [time, batch, units].
    """

    def layer(inputs: torch.Tensor, *others: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        time = inputs.shape[0]
        seen = proxy_tensor.get_proxy_mode() is not None  # each step becomes nodes
        if type(time) is not int or time < 2 or type(inputs) is not FakeTensor or seen:
            return plain(inputs, *others, **options)
        first, states = plain(inputs[:1], *others, **options)
        return first.expand(time, *first.shape[1:]).contiguous(), states

    return layer
