"""The structure of a checkpoint's model, without its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate

from depcut.analysis import Analysis
from depcut.capture.capture import capture
from depcut.capture.inputs import Inputs
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling
from depcut.coupling.infer import infer_coupling
from depcut.errors import InputError
from depcut.graph.operators import is_aten
from depcut.rebuild.recipe import recipe_of
from depcut.reference.norms import estimates

_CPU = torch.device("cpu")


def structure(model: nn.Module, inputs: Inputs = None) -> Analysis:
    """The groups of a model that is on the meta device.

    Args:
        model: As its library builds it from a config.
        inputs: Example inputs, see `depcut.analyze`; their values do not matter.

    Returns:
        The analysis of the same class with the values of the buffers that it makes itself.

    Raises:
        DepcutError: The model cannot be captured, or not be built anew from its config.
    """
    recipe = recipe_of(model)
    if recipe is None:
        raise InputError(
            "no config is known that the model is built from",
            where=type(model).__name__,
            remedy="pass a folder that save_pretrained of transformers wrote",
        )
    with preserved():
        valued = recipe.build({}).eval()
    coupling = infer_coupling(on_cpu(capture(model, inputs)))
    _refuse_rescaled(coupling)
    return Analysis(valued, coupling, inputs)


def on_cpu(program: Program) -> Program:
    """A graph captured on the meta device, changed in place so that it runs on the CPU.

    What it makes, it makes there, and it expects no precision of what it reads.

    Args:
        program: The graph, with those of other calls.
    """

    def moved(leaf: Any) -> Any:
        return _CPU if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

    for each in program.captured:
        for node in list(each.graph.graph.nodes):
            if is_aten(node, "_assert_tensor_metadata") and not node.users:
                each.graph.graph.erase_node(node)
                continue
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(node.kwargs, moved)
    return program


def _refuse_rescaled(coupling: Coupling) -> None:
    """Refuse weights whose kept part is not what stays of them: weight and spectral norm."""
    rescaled = any(effects.rescales for effects in coupling.effects.values())
    if rescaled or estimates(coupling.program):
        raise InputError(
            "the model has weights that are made of others (weight norm, spectral norm)",
            where="depcut.shrink_checkpoint",
            remedy="use depcut.shrink of the loaded model, and save_pretrained",
        )
