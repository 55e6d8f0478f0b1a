"""Train and eval modes of a clone, for the time of a context."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes(model: nn.Module, training: Collection[str] = ()) -> Iterator[None]:
    """Eval mode for the time of the context, but for the modules named in `training`.

    Other threads see that: for a caller's model there is `depcut.capture.clone`.
    """
    saved = [(m, m.training) for m in model.modules()]
    chosen = {m for name, m in model.named_modules() if name in training}
    try:
        for module, _ in saved:
            module.training = module in chosen
        yield
    finally:
        for module, flag in saved:
            module.training = flag
