"""One run of the reference, with what a comparison needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from depcut.plan.keep import Keep
from depcut.reference.run import Reference, Spared, kept_part
from depcut.support.torch_private import pytree
from depcut.verify.compare import Expected
from depcut.verify.module_results import Trial, nested, sampled, top_level
from depcut.verify.replay import Recording


def reference_values(
    keep: Keep,
    model: nn.Module,
    trial: Trial,
    *,
    looks: bool,
    sliced: bool = False,
    tensors: Mapping[str, torch.Tensor] | None = None,
    spared: Spared | None = None,
) -> Expected:
    """What the captured graph computes, and the kept part of what modules get and return.

    Args:
        keep: What stays.
        model: The dense model.
        trial: On which inputs.
        looks: Whether to record what it draws and the numbers that it computes with.
        sliced: Run with narrowed tensors instead of zeros.
        tensors: Parameters and buffers to use in place of the model's, by name.
        spared: Removed indices that contribute all the same, see `Reference`.
    """
    program, env = keep.coupling.program, keep.coupling.env
    top = top_level(program)
    watch = top | nested(program) if trial.deep else top

    def look(node: fx.Node, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or node not in env:
            return None
        part = value if sliced else kept_part(value, keep, env[node])
        if node not in top:
            return sampled(part)
        return part.clone() if part is value else part

    recording = Recording()
    inputs = pytree.tree_leaves(trial.inputs(keep))
    with torch.no_grad():
        outputs, values = Reference(keep, model, sliced, spared).run(
            inputs,
            trial.dtype,
            watch,
            look=look,
            tensors=tensors,
            around=recording.of if looks else None,
        )
    return Expected(outputs, values, recording)
