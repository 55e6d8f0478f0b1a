"""Run a smaller model and record what its modules return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from depcut.axes import Dims
from depcut.capture.clone import clone
from depcut.capture.program import ModuleCall
from depcut.plan.keep import Keep
from depcut.reference.run import example
from depcut.support.torch_private import pytree


@dataclass
class ModuleResults:
    """One run of a smaller model.

    Attributes:
        outputs: Its flat outputs.
        values: Results of its top-level children, by the graph node that computes them.
        shape: The first module result whose shape is not the predicted one, "" if there is none.
    """

    outputs: list[Any]
    values: dict[fx.Node, torch.Tensor]
    shape: str = ""


@dataclass(frozen=True)
class Trial:
    """How to run: rows of the batch (None: all) and precision (None: the model's)."""

    rows: int | None = None
    dtype: torch.dtype | None = None


def module_results(slim: nn.Module, keep: Keep, trial: Trial) -> ModuleResults:
    """Run a clone of a smaller model on the example inputs, and look at what its modules return.

    Args:
        slim: The smaller model; it is only read.
        keep: What stays of the dense one.
        trial: On which of the example inputs.
    """
    return module_results_of_clone(clone(slim, buffers=True), keep, trial)


def module_results_of_clone(slim: nn.Module, keep: Keep, trial: Trial) -> ModuleResults:
    """`module_results` of a clone that the caller has made, possibly with hooks of its own.

    Args:
        slim: A clone of the smaller model, in eval mode; the hooks stay on it.
        keep: What stays of the dense one.
        trial: On which of the example inputs.
    """
    program = keep.coupling.program
    args, kwargs = example(keep, rows=trial.rows, dtype=trial.dtype)
    seen = ModuleResults([], {})
    calls: dict[str, list[ModuleCall]] = {}
    for call in program.calls:
        results = [leaf for leaf in call.out_leaves if isinstance(leaf, fx.Node)]
        if results and keep.gone.nodes.issuperset(results):
            continue  # it is not called any more
        calls.setdefault(call.module, []).append(call)
    for name, module in slim.named_modules():
        if name in calls:
            module.register_forward_hook(_look(name, calls[name], keep, seen))
    with torch.no_grad():
        seen.outputs = list(pytree.tree_leaves(slim(*args, **kwargs)))
    return seen


def _look(
    name: str, calls: list[ModuleCall], keep: Keep, seen: ModuleResults
) -> Callable[..., None]:
    order = iter(calls)

    def hook(_module: nn.Module, _args: Any, result: Any) -> None:
        call = next(order, None)
        if call is None:
            return
        leaves = pytree.tree_leaves(result)
        for node, leaf in zip(call.out_leaves, leaves, strict=False):
            dims = keep.coupling.env.get(node) if isinstance(node, fx.Node) else None
            if not isinstance(dims, tuple) or not isinstance(leaf, torch.Tensor):
                continue
            if not seen.shape and not _as_predicted(leaf, node, dims, keep):
                predicted = tuple(keep.count(t) for t in dims)
                seen.shape = f"{name!r} returns shape {tuple(leaf.shape)} instead of {predicted}"
            if "." not in name:
                seen.values[node] = leaf.detach().clone()

    return hook


def _as_predicted(leaf: torch.Tensor, node: fx.Node, dims: Dims, keep: Keep) -> bool:
    """Whether every size that does not depend on the batch is the predicted one."""
    dense = node.meta["val"].shape
    return leaf.ndim == len(dims) and all(
        size == keep.count(term)
        for size, term, was in zip(leaf.shape, dims, dense, strict=True)
        if isinstance(was, int)
    )
