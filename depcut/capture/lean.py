"""torch.export without the work of which a capture keeps nothing; the graph is the same.

While one thread captures, torch.export does not, for it:

    note a second description of each tensor   beside the tensor itself, which the capture reads
    look for data-dependent sizes again        where no operator has made any
    extract the whole stack of every node      only its frames that are kept in the end
    compile the code of every graph on the way what is never run is never compiled
    watch calls of the torch API               by which an operator becomes a node
    compute the shapes of a result             where it has that of its input
    cache results of operators                 of which the shapes of another one are computed
    run recurrent layers step by step          all steps being alike
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import threading
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from depcut.capture.elementwise import shaped_as_input
from depcut.capture.recurrence import of_one_step
from depcut.support.torch_private import (
    OpOverload,
    lazy_graph_modules,
    replaced_to_be_lean,
    stack_anchors,
    without_torch_functions,
)

_TORCH = "torch/__init__.py"


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """The state in which torch.export leaves out what a capture keeps nothing of, in this thread.

    One thread at a time may be in it.
    """
    instead: dict[str, Callable[[Any], Any]] = {
        "description": lambda _plain: lambda *_args, **_kwargs: None,
        "bindings": _bindings,
        "stacks": _Stacks,
        "dispatch": _dispatch,
        "shapes": _shapes,
        "computation": _computation,
        "lstm": of_one_step,
        "rnn": of_one_step,
    }
    thread = threading.get_ident()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lazy_graph_modules())
        for what, (owner, name) in replaced_to_be_lean().items():
            plain = getattr(owner, name)
            stack.callback(setattr, owner, name, plain)
            here = instead[what](plain)
            setattr(owner, name, here if what == "stacks" else by_thread(thread, here, plain))
        yield


def by_thread(thread: int, here: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """What stands for a function: another one in one thread, itself in all others.

    Args:
        thread: Its number.
        here: What is called there.
        plain: The function.
    """

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (here if threading.get_ident() == thread else plain)(*args, **kwargs)

    return chosen


def _bindings(plain: Callable[[Any], None]) -> Callable[[Any], None]:
    """Data-dependent sizes are bound again where there are any."""

    def bindings(module: Any) -> None:
        if any("unbacked_bindings" in node.meta for node in module.graph.nodes):
            plain(module)

    return bindings


def _dispatch(plain: Callable[..., Any]) -> Callable[..., Any]:
    """An operator becomes a node, and gets its shapes, unseen by what watches the torch API.

    That is torch's own work; of operators that run functions of the user, all is seen.
    """

    def dispatch(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(func, OpOverload):
            return plain(mode, func, *args, **kwargs)
        with without_torch_functions():
            return plain(mode, func, *args, **kwargs)

    return dispatch


def _shapes(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Where a result has its input's shape, that is not computed."""

    def shapes(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = shaped_as_input(mode, func, args, kwargs)
        return plain(mode, func, types, args, kwargs) if known is None else known

    return shapes


def _computation(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Results are cached of the operators that a model runs alone.

    An operator that others are computed by is of other sizes each time, and is found again with
    them: to enter it in the cache takes longer than to compute it.
    """

    def computation(mode: Any, *args: Any, **kwargs: Any) -> Any:
        enabled, mode.cache_enabled = mode.cache_enabled, False
        try:
            return plain(mode, *args, **kwargs)
        finally:
            mode.cache_enabled = enabled

    return computation


class _Stacks:
    """In place of what extracts stacks: of the thread that made it, the frames that are kept.

    Args:
        plain: What extracts those of other threads.
    """

    def __init__(self, plain: Any) -> None:
        self._plain, self._thread = plain, threading.get_ident()

    def extract(self, *args: Any, **kwargs: Any) -> Any:
        """A stack, to be asked for its summary."""
        if args or kwargs or threading.get_ident() != self._thread:
            return self._plain.extract(*args, **kwargs)
        return _Stack(inspect.currentframe())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


class _Stack:
    """Those frames of a stack whose names tell that torch.fx keeps them.

    Args:
        frame: The innermost one. No name keeps it: what holds a frame holds all its tensors.
    """

    def __init__(self, frame: FrameType | None) -> None:
        self._frames: list[tuple[CodeType, int]] = []
        anchors = stack_anchors()
        while frame is not None:
            code = frame.f_code
            named = code.co_name == "forward" or code.co_filename.endswith(_TORCH)
            if named or (code.co_filename, code.co_name) in anchors:
                self._frames.append((code, frame.f_lineno))
            frame = frame.f_back

    def summary(self) -> traceback.StackSummary:
        """The frames, outermost first."""
        found = [
            traceback.FrameSummary(
                code.co_filename,
                line,
                code.co_name,
                lookup_line=False,
                line=linecache.getline(code.co_filename, line),
            )
            for code, line in reversed(self._frames)
        ]
        return traceback.StackSummary.from_list(found)
