"""All that a capture changes in the process, in one place, for one thread at a time.

A structural clone (`depcut.capture.clone`) keeps the caller's model out of a capture. What is left
belongs to the process, and other threads may be serving a model meanwhile. So every change here
either acts in the capturing thread alone, or does not alter a result:

    math.sqrt                     of numbers that remember where they came from; plain otherwise
    the attention fast path       off in the capturing thread
    torch.compiler's flags        on in the capturing thread; torch.export sets them for all
    oneDNN, NNPACK, cuDNN         stay on; torch.export switches them off for all
    nn.Module.__call__            torch.export's tracer sees the calls of the capturing thread only
    torch.export                  leaves out in the capturing thread what a capture keeps nothing of
    torch.onnx                    leaves out in the converting thread what it knows (`deploy`)
    logging, stderr, warnings     of the capturing thread are dropped
    garbage collection            off during captures and conversions, and while time is measured
    the environment               without what torch adds to it
    attention kernels             the formula's in all threads, while second derivatives are taken
    random states                 as before afterwards

One re-entrant lock is held during a capture: torch.export replaces methods of classes, and two that
overlap would leave them replaced. The last two states end when no thread needs them any more.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from depcut.capture.flags import flags_as_before
from depcut.capture.lean import lean
from depcut.capture.random_state import preserved
from depcut.support.torch_private import COMPILER_FLAGS, replaced_by_export

_LOCK = threading.RLock()


class _Shared:
    """A state of the process that several threads may ask for: entered once, left by the last.

    Contexts that overlap without being nested would otherwise restore each other's state.

    Args:
        context: Makes what sets and restores the state.
    """

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._context, self._lock, self._users = context, threading.Lock(), 0
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The state, until nobody needs it any more."""
        with self._lock:
            if not self._users:
                self._stack.enter_context(self._context())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._stack.close()


class _Switch:
    """A flag with another value in the thread that made it; in expressions, a bool."""

    def __init__(self, here: bool, elsewhere: Any) -> None:
        self._thread, self._here, self._elsewhere = threading.get_ident(), here, elsewhere

    def __bool__(self) -> bool:
        return self._here if threading.get_ident() == self._thread else bool(self._elsewhere)

    def __int__(self) -> int:
        return int(bool(self))

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    def __xor__(self, other: Any) -> Any:
        return bool(self) ^ other

    __ror__, __rand__, __rxor__ = __or__, __and__, __xor__


@contextlib.contextmanager
def capturing(root: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """The state in which a clone is captured by torch.export, or run on fake tensors.

    Args:
        root: What stands for `math.sqrt`; where it is given, only what depcut reads of a capture is
            computed.
    """
    importing("sympy")
    states = (
        *(flags_as_before(), preserved(), same_environment(), quiet()),
        *(_own_export(), _no_fast_paths()),
    )
    with _LOCK, contextlib.ExitStack() as to:
        for state in states:
            to.enter_context(state)
        if root is not None:
            to.enter_context(_patched(math, "sqrt", root))
            to.enter_context(lean())
            to.enter_context(uncollected())
        yield


def importing(name: str) -> None:
    """Import a library without the warning filters that it sets for the process.

    Args:
        name: Of its outermost module.

    Raises:
        ImportError: It is not installed.
    """
    if name not in sys.modules:
        with warnings.catch_warnings():
            importlib.import_module(name)


@contextlib.contextmanager
def same_environment() -> Iterator[None]:
    """Without the variables that torch adds to the environment when it is first at work."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            if name.startswith("TORCH"):
                os.environ.pop(name, None)


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """The state in which a model's own code computes what its captured graph does.

    Encoders of torch leave out padded positions on their inference path, and return zeros there.
    """
    with _LOCK, _no_fast_paths():
        yield


@contextlib.contextmanager
def converting() -> Iterator[None]:
    """The state in which a clone is captured and converted to ONNX."""
    with capturing(), uncollected():
        yield


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# A collection would search the millions of objects of a capture or a conversion often, and find few
# to free, or fall into a timing.
uncollected = _Shared(_uncollected)
# Fused kernels of attention cannot be differentiated twice, and the choice is the process's.
formula_attention = _Shared(lambda: sdpa_kernel(SDPBackend.MATH))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What this thread logs, warns of, or writes to standard error is dropped.

    torch reports failed exports and fake runs at length; what is raised says enough.
    """
    mine = _ThisThread()
    handlers = set(logging.root.handlers)
    for logger in logging.root.manager.loggerDict.copy().values():
        handlers.update(logger.handlers if isinstance(logger, logging.Logger) else ())
    if logging.lastResort is not None:
        handlers.add(logging.lastResort)
    entry: Any = ("ignore", mine, Warning, None, 0)
    filters, stream = warnings.filters, sys.stderr
    ours = _Stream(mine, stream)
    try:
        for handler in handlers:
            handler.addFilter(mine)
        filters.insert(0, entry)  # type: ignore[attr-defined]
        sys.stderr = ours
        yield
    finally:
        mine.ended = True
        if sys.stderr is ours:
            sys.stderr = stream
        for held in (filters, warnings.filters):
            if entry in held:
                held.remove(entry)  # type: ignore[attr-defined]
        for handler in handlers:
            handler.removeFilter(mine)


class _ThisThread:
    """Recognises what the thread that made it does, until it has ended."""

    def __init__(self) -> None:
        self.thread, self.ended = threading.get_ident(), False

    def is_on(self) -> bool:
        """Whether it is asked in its thread and in its time."""
        return not self.ended and threading.get_ident() == self.thread

    def filter(self, _: logging.LogRecord) -> bool:
        """Of a handler: which records pass."""
        return not self.is_on()

    def match(self, _: str) -> bool:
        """Of an entry of `warnings.filters`: to which messages it applies."""
        return self.is_on()


class _Stream:
    """A stream that drops what one thread writes."""

    def __init__(self, mine: _ThisThread, stream: Any) -> None:
        self._mine, self._stream = mine, stream

    def write(self, text: str) -> int:
        """Write, unless it is the thread whose output is dropped."""
        return len(text) if self._mine.is_on() else int(self._stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _no_fast_paths() -> Iterator[None]:
    """No inference path of `nn.MultiheadAttention` and what is built of it, in this thread."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(_Switch(False, before))  # type: ignore[arg-type]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """In place of torch.export's own: the flags are on in this thread."""
    with contextlib.ExitStack() as stack:
        for name in COMPILER_FLAGS:
            switch = _Switch(True, getattr(torch.compiler, name))
            stack.enter_context(_patched(torch.compiler, name, switch))
        yield


@contextlib.contextmanager
def _own_export() -> Iterator[None]:
    """torch.export without what it does to other threads."""
    # What other threads get in place of what is replaced for this one.
    elsewhere: dict[str, Callable[..., Any]] = {
        "call": lambda _tracer, _module, forward, args, kw: forward(*args, **kw),
        "attribute": lambda _tracer, _name, value, _cache: value,
        "autowrap": lambda *_: None,
    }
    instead = {"backends": contextlib.nullcontext, "compiling": _compiling}
    with contextlib.ExitStack() as stack:
        for what, (owner, name) in replaced_by_export().items():
            own: Any = instead.get(what)
            if own is None:
                own = _by_thread(getattr(owner, name), elsewhere[what])
            stack.enter_context(_patched(owner, name, own))
        yield


def _by_thread(here: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    def chosen(*args: Any) -> Any:
        return (here if threading.get_ident() == thread else elsewhere)(*args)

    return chosen
