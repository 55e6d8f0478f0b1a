"""The check by value of every example call."""

from __future__ import annotations

import math

from torch import nn

from depcut.errors import in_call
from depcut.plan.keep import Keep
from depcut.rewrite.build import Slim
from depcut.verify.verify import verify, verify_equal


def verify_calls(slim: Slim, model: nn.Module) -> float:
    """`verify` on every example call, until none has a module patched or generated any more.

    Args:
        slim: The rewritten model; its `model`, `patched` and `generated` may change.
        model: The dense model.

    Returns:
        The largest difference of all calls; NaN where one is.

    Raises:
        VerificationError: The smaller model computes something else in one of the calls.
    """
    whole = slim.keep
    try:
        while True:
            changed, differences = {*slim.generated, *slim.patched}, []
            for number, keep in enumerate(whole.calls):
                slim.keep = keep
                with in_call(number, len(whole.calls)):
                    differences.append(verify(slim, model))
            if len(whole.calls) == 1 or changed == {*slim.generated, *slim.patched}:
                return _largest(differences)
    finally:
        slim.keep = whole


def verify_equal_calls(slim: nn.Module, keep: Keep, model: nn.Module) -> float:
    """`verify_equal` on every example call.

    Args:
        slim: The smaller model.
        keep: What stays.
        model: The dense model.

    Returns:
        The largest difference of all calls.

    Raises:
        VerificationError: The smaller model computes something else in one of the calls.
    """
    differences = []
    for number, each in enumerate(keep.calls):
        with in_call(number, len(keep.calls)):
            differences.append(verify_equal(slim, each, model))
    return _largest(differences)


def _largest(differences: list[float]) -> float:
    return math.nan if any(map(math.isnan, differences)) else max(differences)
