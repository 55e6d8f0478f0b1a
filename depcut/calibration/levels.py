"""The mean square of a few hundred inputs, of which a few may be a thousand times larger."""

from __future__ import annotations

import torch

_OUTLIER = 10  # times the level; what is larger counts as that much
_ROUNDS = 256  # of which some ten are needed, unless nearly a tenth of the inputs is large


def level(squares: torch.Tensor) -> torch.Tensor:
    """Mean over the inputs, where those beyond ten times the result count as just that.

    What is added to second moments is set by it. A language model has a few massive activations (a
    few channels at a few tokens, Sun et al. 2024), by which a plain mean would drown all others.
    Without outliers, it is the plain mean. Where a tenth of the inputs or more are that large, they
    are none.

    Args:
        squares: Sums of squares, (blocks, in), not negative.

    Returns:
        (blocks,).
    """
    found = squares.mean(1)
    for _ in range(_ROUNDS):
        most = _OUTLIER * found[:, None]
        if not bool((squares > most).any()):
            break
        found = torch.minimum(squares, most).mean(1)
    return found
