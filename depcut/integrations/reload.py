"""Whether `from_pretrained`, which builds a class from its config, would bring a model back."""

from __future__ import annotations

from typing import Any

from torch import nn

from depcut.capture.process_state import quiet
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError
from depcut.rebuild.recipe import Recipe
from depcut.rebuild.stock import check_tensors_of
from depcut.rebuild.twin import Twin, twin_of
from depcut.rewrite.patches import PATCHES
from depcut.support.failures import first_line, reraise_fatal


def reload_problem(model: nn.Module, recipe: Recipe) -> str | None:
    """Why `from_pretrained` would not bring a model back as it is, if it would not.

    The tensors that the config builds must be the model's, and those that no file holds have its
    values. That it computes the same then is proved where a config gets new numbers; where it does
    not, what is narrower has another shape.

    Args:
        model: The model; it is only read.
        recipe: How its library builds it.
    """
    try:
        with preserved(), quiet():
            built = twin_of(recipe.build({}))
        problem = _other_tensors(twin_of(model), built)
        if problem is None:
            check_tensors_of(model, built)
        return problem
    except VerificationError as error:
        return f"{error.where}: {error.what}"
    except Exception as error:  # noqa: BLE001  (whatever a class raises is the reason)
        reraise_fatal(error)
        return f"{stock_class(model).__name__} made from its config fails: {first_line(error)}"


def stock_class(model: nn.Module) -> Any:
    """The class of a model without what was patched in it.

    Args:
        model: Any model.
    """
    kind = type(model)
    while PATCHES in vars(kind):
        kind = kind.__bases__[0]
    return kind


def _other_tensors(mine: Twin, built: Twin) -> str | None:
    """The first tensor that one of them lacks, or has in another shape."""
    missing = sorted({*built.shapes} - {*mine.shapes})
    if missing:
        return f"its config builds {missing[0]}, which is gone{_more(missing)}"
    left = sorted({*mine.shapes} - {*built.shapes})
    if left:
        return f"its config builds no {left[0]}{_more(left)}"
    wrong = [n for n, shape in mine.shapes.items() if shape != built.shapes[n]]
    if not wrong:
        return None
    is_now, was = (" x ".join(map(str, t.shapes[wrong[0]])) for t in (mine, built))
    return f"{wrong[0]} is {is_now}, its config builds {was}{_more(wrong)}"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
