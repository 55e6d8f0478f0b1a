"""What the layers that read a unit lose with it, after the best repair: optimal brain surgery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from depcut.axes import Axis
from depcut.calibration.site import Site
from depcut.calibration.sites import find_sites
from depcut.calibration.visits import visits
from depcut.coupling import Coupling, Group
from depcut.scores.context import Context, Scores

_DAMPING = 1e-2  # of the mean variance of the inputs
_ROUNDS = 64  # in which the units of a group are eliminated, at most


@dataclass
class _Reader:
    """One weight that reads a group: covariance of its inputs and Gram matrix of its columns.

    Attributes:
        inverse: Inverse of the damped covariance, (blocks, in, in).
        gram: W^T W over the outputs, (blocks, in, in).
        columns: Columns of each unit that is left, (units, columns of a unit).
        energy: Variance of the outputs.
    """

    inverse: torch.Tensor
    gram: torch.Tensor
    columns: torch.Tensor
    energy: float


def obs(context: Context) -> Scores:
    """Loss of reconstruction when units go one after the other, the rest re-solved each time.

    For a weight W (out, in) that reads inputs of covariance H, removing the columns S and
    re-solving the others costs tr(W_S ((H^-1)_SS)^-1 W_S^T); W and H^-1 are then updated for the
    next removal. Summed over all weights that read the unit, each in units of its outputs' variance.
    The cheapest units go first; a unit's score is the loss that its removal added, so that sums
    over what is removed are losses of reconstruction.

    Units that no such weight reads (head_dim of queries and keys) are ranked by the energy of their
    terms in the product; where there is none, by the group's L2 norm.

    Source: Kurtic et al., ZipLM, NeurIPS 2023, eq. 3-5; Hassibi & Stork 1992. Needs data.
    """
    raise NotImplementedError(Sequence, Axis, fx.Node, Group, Coupling, Site, find_sites, visits)
