"""Why nothing can be chosen at all."""

from __future__ import annotations

from collections.abc import Sequence

from depcut.coupling.groups import Frozen
from depcut.errors import BudgetError, listed


def refuse_frozen(frozen: Sequence[Frozen], model: str) -> None:
    """Refuse to choose where no group is free.

    Args:
        frozen: The dimensions, with the reasons.
        model: The name of its class.

    Raises:
        BudgetError: Always.
    """
    reasons: dict[str, list[str]] = {}
    for dimension in frozen:
        if dimension.size > 1:
            reasons.setdefault(dimension.reason, []).append(dimension.tensor)
    text = "; ".join(f"{why} ({listed(names, 2)})" for why, names in reasons.items())
    raise BudgetError(
        f"nothing can be removed: {text or 'the model has no parameters of two dimensions'}",
        where=model,
        remedy="see print(depcut.analyze(model, inputs)); a hidden layer is needed",
    )
