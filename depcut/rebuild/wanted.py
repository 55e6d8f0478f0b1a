"""Whether a plan's widths are limited to what a config can say, as the option asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from depcut.errors import InputError
from depcut.plan.stacks import REBUILD
from depcut.rebuild.rebuilding import Rebuilding
from depcut.rebuild.recipe import recipe_of


def limits(
    found: Callable[[], tuple[Rebuilding | None, str]], wanted: bool | str
) -> tuple[Rebuilding | None, str]:
    """What limits the widths, if anything does.

    Args:
        found: Finds out what the class can express; or None, and why.
        wanted: The option: True, False or "auto".

    Returns:
        It; or None, and why not, "" where it is not asked for.

    Raises:
        InputError: True is asked for, and the class cannot be built anew.
    """
    if wanted is False:
        return None, ""
    limit, why = found()
    if limit is None and wanted is True:
        raise InputError(
            f"the model cannot be rebuilt from a config: {why}",
            where="rebuildable=True",
            remedy="leave rebuildable out, or pass rebuildable=False: widths are cut freely",
        )
    return limit, why


def unlimited(model: nn.Module, why: str) -> dict[str, Any]:
    """What a plan's settings say of a model whose library builds classes from a config.

    Args:
        model: The model.
        why: Why its widths are free, "" where they are not, or were asked to be.
    """
    known = why and recipe_of(model) is not None
    return {REBUILD: {"off": why, "fields": [], "held": {}}} if known else {}
