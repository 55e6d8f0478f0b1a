"""One pass over the calibration data that shows the arguments of chosen nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from depcut.calibration.data import Calibration
from depcut.calibration.progress import ticking
from depcut.capture.program import where
from depcut.coupling.groups import Coupling
from depcut.errors import InputError
from depcut.graph.arguments import Call, bound
from depcut.plan.keep import Keep
from depcut.reference.run import Reference


def visits(
    coupling: Coupling,
    model: nn.Module,
    calibration: Calibration,
    nodes: Sequence[fx.Node],
    label: str = "statistics",
) -> Iterator[tuple[int, fx.Node, Call]]:
    """(number of the batch, node, values of its arguments) whenever the dense model runs a node.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.
        calibration: The batches.
        nodes: The nodes to stop before.
        label: What the progress bar says.

    Raises:
        InputError: The model turns the data into NaN or infinite values.
    """
    reference = Reference(Keep(coupling, {}), model)
    stops = set(nodes)
    for number, batch in enumerate(ticking(calibration, label)):
        with torch.no_grad():
            for paused in reference.steps(calibration.leaves(batch), stops=stops):
                call = bound(paused.node, paused.args, paused.kwargs)
                for value in call.values():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        check_finite(value, number, paused.node)
                yield number, paused.node, call


def check_finite(value: torch.Tensor, number: int, node: fx.Node) -> None:
    """Refuse activations that are not finite; minus infinity is left to masks.

    Args:
        value: An argument of a node.
        number: Of the batch.
        node: The node.

    Raises:
        InputError: It holds NaN or plus infinity.
    """
    if bool(torch.isfinite(value.sum())):
        return
    bad = torch.isnan(value) | (value == float("inf"))
    if bool(bad.any()):
        raise InputError(
            f"{int(bad.sum())} of {value.numel()} activations are NaN or infinite for item "
            f"{number} of the data",
            where=where(node),
            remedy="look for extreme values in that item, or for a model that overflows",
        )
