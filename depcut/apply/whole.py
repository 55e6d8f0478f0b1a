"""The whole model around a part that was made smaller."""

from __future__ import annotations

from torch import nn

from depcut.capture.part import Part
from depcut.errors import VerificationError
from depcut.verify.whole import verify_whole


def whole_result(slim: nn.Module, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The whole model with its smaller part, compared with the dense one; any other as it is.

    Args:
        slim: What was made smaller, verified.
        model: The dense model, or the part of it that was captured.

    Returns:
        The model, and what the report has to say of it.

    Raises:
        VerificationError: The whole does not compute what it should.
    """
    if not isinstance(model, Part):
        return slim, ()
    part, whole, calls = (vars(model)[name] for name in ("part", "whole", "calls"))
    if not isinstance(slim, Part):
        raise VerificationError(
            "the whole part would have to be generated from the graph",
            where=part,
            remedy="keep the layers concerned with ignore=, or name a smaller part",
        )
    result = slim.assembled()
    problem = verify_whole(result, whole, part, calls)
    note = f"{part!r} alone was captured: MACs are its own, and what it returns keeps its sizes"
    return result, (note, problem) if problem else (note,)
