"""Every error that a user of depcut can cause: what happened, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DepcutError(Exception):
    """Base of all depcut errors; its message says what, where and what to do.

    Args:
        what: The mistake or obstacle, with the values involved.
        where: Layer, tensor or source line that it concerns.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if remedy:
            lines.append(f"  to do: {remedy}")
        super().__init__("\n".join(lines))


class TorchVersionError(DepcutError, ImportError):
    """The installed torch is older than the oldest one that depcut runs on."""


class CaptureError(DepcutError):
    """The model could not be turned into a graph."""


class InputError(DepcutError, ValueError):
    """An argument has the wrong kind, range or name."""


class CallError(CaptureError, InputError):
    """The model itself raises on the inputs: they, or its own code, are wrong."""


class BudgetError(DepcutError, ValueError):
    """The requested ratio cannot be reached, or nothing can be removed at all."""


class PlanError(DepcutError, ValueError):
    """A plan is malformed or belongs to another architecture."""


class RuleError(DepcutError):
    """An operator rule is wrong: registered twice, or inconsistent with the captured graph."""


class VerificationError(DepcutError):
    """The smaller model does not compute what the dense model computes on the kept units."""


class ExportError(DepcutError):
    """The model could not be written as ONNX, or the file disagrees with PyTorch."""


class LatencyError(DepcutError):
    """Time could not be measured, or not well enough to rely on it."""


class TrainingError(DepcutError):
    """Training cannot go on: a loss that is not finite, or a checkpoint of another run."""


class ProcessError(DepcutError):
    """Another of several processes failed, or was given another model, data or options."""


def listed(names: list[str], limit: int = 8) -> str:
    """The names, comma-separated, the ones past `limit` as a count."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


@contextmanager
def in_call(number: int, calls: int) -> Iterator[None]:
    """Errors of depcut that are raised inside say which of several example calls they are of.

    Args:
        number: Which one, from 0.
        calls: How many there are; of one, errors stay what they are.
    """
    with in_part(f"inputs[{number}]" if calls > 1 else ""):
        yield


@contextmanager
def in_part(name: str) -> Iterator[None]:
    """Errors of depcut that are raised inside say which part of what was given they are of.

    Args:
        name: Of the part; "" where there is one alone: errors stay what they are.
    """
    try:
        yield
    except DepcutError as error:
        if not name:
            raise
        what = f"{name}: {error.what}"
        raise type(error)(what, where=error.where, remedy=error.remedy) from error
