"""torch.onnx.export without the work that is the same for every model; the file is the same.

While one thread converts, torch.onnx does not, for it:

    parse the source of every translation      of which it reads the names alone
    read the annotations of every translation  that it has read before
    look for new composite operators           again for each namespace of operators
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from depcut.capture.lean import by_thread
from depcut.support.onnx_private import SIGNATURE, replaced_to_translate, translations

_Function = Callable[..., Any]


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """The state in which torch.onnx leaves that out, in this thread.

    One thread at a time may be in it.
    """
    instead: dict[str, Callable[[Any], _Function]] = {
        "translations": _listed,
        "signature": _signature,
        "composites": _once,
    }
    thread = threading.get_ident()
    with contextlib.ExitStack() as stack:
        for what, (owner, name) in replaced_to_translate().items():
            plain = getattr(owner, name)
            stack.callback(setattr, owner, name, plain)
            setattr(owner, name, by_thread(thread, instead[what](plain), plain))
        yield


def _listed(plain: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    """The list is made anew where translations were registered since it was."""

    def listed() -> list[Any]:
        return [*_list_of(plain, translations())]

    return listed


@functools.lru_cache(maxsize=1)
def _list_of(plain: Callable[[], list[Any]], _: tuple[Any, ...]) -> list[Any]:
    return plain()


def _signature(plain: _Function) -> _Function:
    """torch.onnx notes on a translation what it has read."""

    def signature(function: Any, *args: Any, **kwargs: Any) -> Any:
        known = getattr(function, SIGNATURE, None)
        return plain(function, *args, **kwargs) if known is None else known

    return signature


def _once(plain: Callable[[], None]) -> Callable[[], None]:
    """Nothing registers operators while a model is converted."""
    return functools.cache(plain)
