"""The signature of a forward, with a parameter for every keyword that a call passes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

_Parameter = inspect.Parameter


def name_keywords(model: nn.Module, keywords: Collection[str]) -> None:
    """Give a forward that takes `**kwargs` one parameter for each keyword of a call.

    torch.export leaves no size of a tensor open that `**kwargs` takes: it looks for the dynamic
    shapes once under the name of `**kwargs` and once under those of the keywords.

    Args:
        model: A clone; it gets another `forward`, which calls its own.
        keywords: Names of the keyword arguments of the call.
    """
    forward = model.forward
    signature = inspect.signature(forward)
    known = [p for p in signature.parameters.values() if p.kind is not _Parameter.VAR_KEYWORD]
    if len(known) == len(signature.parameters):
        return
    names = {p.name for p in known}
    added = [_Parameter(k, _Parameter.KEYWORD_ONLY) for k in keywords if k not in names]

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    vars(named)["__signature__"] = signature.replace(parameters=[*known, *added])
    vars(model)["forward"] = named
