"""Dropout of fused attention, which a capture in eval mode does not show."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from depcut.capture.clone import clone
from depcut.capture.process_state import capturing
from depcut.capture.program import Program, module_of
from depcut.graph.operators import is_aten
from depcut.support.failures import reraise_fatal
from depcut.support.torch_private import FakeTensorMode, pytree


def when_training(training: bool, probability: float) -> float:
    """The dropout probability: none in eval mode."""
    return probability if training else 0.0


def attention_dropout(model: nn.Module, program: Program) -> dict[fx.Node, float]:
    """Dropout probability in training of every fused attention of the graph.

    A clone runs once on fake tensors, with the modules that call attention in training mode.

    Args:
        model: The dense model; it is only read.
        program: Its captured graph.
    """
    nodes = [n for n in program.graph.graph.nodes if is_aten(n, "scaled_dot_product_attention")]
    callers = {module_of(n) for n in nodes}
    if not any(_may_drop(model.get_submodule(name)) for name in callers):
        return {}
    recorder = _Recorder()
    seen = clone(model, training=callers)
    with capturing(), FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        args, kwargs = pytree.tree_map(
            lambda v: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v,
            (program.args, program.kwargs),
        )
        held: dict[str, torch.Tensor] = {
            n: fake.from_tensor(t) for n, t in (*seen.named_parameters(), *seen.named_buffers())
        }
        try:
            with recorder:
                torch.func.functional_call(seen, held, tuple(args), kwargs)
        except Exception as error:  # noqa: BLE001  (of the user's code)
            reraise_fatal(error)
            return {}  # training code that fake tensors cannot follow
    if len(recorder.probabilities) != len(nodes):
        return {}
    return {n: p for n, p in zip(nodes, recorder.probabilities, strict=True) if p > 0}


def _may_drop(module: nn.Module) -> bool:
    """Whether the module or a child of it holds a probability."""
    holders = (module, *module.children())
    return any(
        isinstance(value, float) and 0 < value < 1 and ("drop" in key or key == "p")
        for holder in holders
        for key, value in vars(holder).items()
    )


class _Recorder(TorchFunctionMode):
    """Notes the dropout probability of each call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[float] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Intercept one call of the torch API."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.probabilities.append(
                float(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
            )
        elif func is functional.multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **kwargs).arguments
            if bound.get("need_weights", True):
                return func(*args, **kwargs)  # it is not fused, and not among the nodes
            drops = bound.get("training", True)
            self.probabilities.append(float(bound["dropout_p"]) if drops else 0.0)
        return func(*args, **kwargs)
