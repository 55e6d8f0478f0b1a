"""Runs of the captured graph on a model's tensors that autograd can follow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from depcut.capture.held import held_tensors
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.graph.interpreter import Interpreter, Pausing
from depcut.support.memory import free_memory
from depcut.synthetic.subject import Leaves

Given = tuple[tuple[Any, ...], dict[str, Any]]  # the (args, kwargs) that a node is called with

_SHARE = 4  # of the free memory that one run may take; its gradients take as much again


class Run(Interpreter):
    """One run; nothing is computed but what autograd may need.

    Args:
        program: The captured graph.
        model: What `Subject.own_model` gave.

    Attributes:
        nbytes: Of all values that were computed.
    """

    def __init__(self, program: Program, model: nn.Module) -> None:
        super().__init__(program)
        self.held: Mapping[str, Tensor] = held_tensors(model)
        self.nbytes = 0

    def tensor(self, node: fx.Node, name: str) -> Any:  # noqa: ARG002  (a hook)
        """The model's own tensor; a copy of a buffer, which may be written to in place."""
        held = self.program.constants if name in self.program.anonymous else self.held
        source = held[name].detach()
        return source if name in self.program.parameters else source.clone()

    def made(self, node: fx.Node) -> None:
        """Count the bytes of a value."""
        value = self.values.get(node)
        if node.op == "call_function" and isinstance(value, Tensor):
            self.nbytes += value.nbytes

    def steps(self, inputs: Sequence[Any], stops: Collection[fx.Node] = ()) -> Pausing:
        """Run node by node, pausing before some of them; the bytes are counted anew."""
        self.nbytes = 0
        return super().steps(inputs, stops)

    def arguments_of(
        self, nodes: Collection[fx.Node], leaves: Leaves
    ) -> Iterator[tuple[fx.Node, Given]]:
        """The values of the arguments of some nodes, up to the last one of them.

        Args:
            nodes: Of the graph.
            leaves: Flat inputs.
        """
        ahead = len(set(nodes))
        steps = self.steps(leaves, frozenset(nodes))
        for paused in steps:
            yield paused.node, (paused.args, paused.kwargs)
            ahead -= 1
            if not ahead:
                steps.close()


@contextmanager
def differentiable(seed: int) -> Iterator[None]:
    """Gradients are recorded; draws of the model's own code start from a seed, and leave no trace.

    Args:
        seed: Of the draws.
    """
    with preserved(), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        yield


def rows_that_fit(nbytes: int, rows: int, device: torch.device) -> int:
    """How many rows a differentiated run may have, by the memory that is free.

    Args:
        nbytes: That the values of a run took.
        rows: That it had.
        device: That it ran on.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return int(free / _SHARE * rows / max(nbytes, 1))
