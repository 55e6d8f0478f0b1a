"""Inputs that reproduce what the batch norms of a model have stored of its training data.

From gaussian noise, inputs are optimised until what every batch norm reads has the running mean and
variance that the norm holds, channel by channel (ZeroQ: Cai et al., CVPR 2020, equations 2 and 3;
DeepInversion: Yin et al., CVPR 2020, equation 4).
"""

from __future__ import annotations

import math

from depcut.synthetic.descent import descents, probed
from depcut.synthetic.floats import layout
from depcut.synthetic.running import Run, differentiable
from depcut.synthetic.statistics import Norms, norms_of
from depcut.synthetic.subject import Made, Subject


def batch_norm(subject: Subject) -> Made | None:
    """Inputs optimised to the running statistics of all batch norms.

    Args:
        subject: The model.

    Returns:
        None where no batch norm has any that the inputs reach, no input is floating-point data, the
        distance is not finite, or the time does not suffice for two rows.
    """
    plan = layout(subject)
    nodes = norms_of(subject.program, plan.nodes)
    if not nodes:
        return None
    norms = Norms(Run(subject.program, subject.own_model()), nodes)
    with differentiable(subject.seed):
        work = probed(subject, plan, norms.distance, lambda: norms.run.nbytes, plan.scales())
        found = [] if work is None else descents(subject, plan, lambda _: norms.distance, work)
    if not found:
        return None
    rows = sum(f.rows for f in found)
    first = math.sqrt(sum(f.rows * f.first for f in found) / rows)
    last = math.sqrt(sum(f.rows * f.last for f in found) / rows)
    norm = "batch norm" if len(nodes) == 1 else f"{len(nodes)} batch norms"
    return Made(
        plan.items(f.leaves for f in found),
        f"noise optimised to the statistics of {norm}{plan.rest}",
        f"statistics of {norm}: off by {first:.2g} standard deviations at first, {last:.2g} at the "
        "end",
    )
