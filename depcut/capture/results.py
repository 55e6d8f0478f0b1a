"""What a forward returns, leaf by leaf: what a capture can carry of it, and which outputs count.

Outputs that do not count are followed like all others, so that what computes them shrinks along,
but they are not held: their dimensions may become narrower.
"""

from __future__ import annotations

import dataclasses
import glob
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from depcut.capture.convention import convention_of
from depcut.errors import CaptureError, InputError, listed
from depcut.support.failures import shown
from depcut.support.torch_private import pytree

Outputs = str | int | Sequence[str | int] | None
Names = tuple[str | int, ...]
EVERY: Names = ("*",)  # outputs= that makes all of them count

_CARRIED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, str)
_LEVELS = 4  # of objects in each other that are searched for tensors
_HOW = 'pass names such as ("logits",), or positions such as (0,)'


@dataclass(frozen=True)
class _Leaf:
    """One leaf of a result.

    Attributes:
        path: Keys, attributes and positions that lead to it, joined by dots.
        value: It.
        carried: Whether torch.export can return it from where it is.
        within: Whether it is part of an object that is no container, such as a cache.
    """

    path: str
    value: Any
    carried: bool = True
    within: bool = False


@dataclass(frozen=True)
class Results:
    """The captured outputs of one example call, in their order.

    Attributes:
        paths: Keys, attributes and positions that lead to each, joined by dots.
        counts: Whether each is compared, and its dimensions held.
        picked: Whether the tensors were picked from what torch.export cannot return.
        dropped: What was not captured, in words.
    """

    paths: tuple[str, ...] = ()
    counts: tuple[bool, ...] = ()
    picked: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def names(self) -> Names:
        """Names that, as outputs=, make the same outputs count."""
        return EVERY if all(self.counts) else names_of([self])

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Paths of the outputs that do not count."""
        return tuple(p for p, c in zip(self.paths, self.counts, strict=True) if not c)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in words."""
        left = f"not captured of the outputs: {listed(list(self.dropped))}" if self.dropped else ""
        apart = listed(list(dict.fromkeys(p.partition(".")[0] for p in self.uncounted)))
        rest = (
            f"these outputs do not count and may become narrower: {apart}; outputs= names those "
            "that count"
        )
        return tuple(filter(None, (left, rest if self.uncounted else "")))

    def of(self, outputs: Sequence[Any]) -> list[Any]:
        """Those that count.

        Args:
            outputs: All of them, in the order of the captured ones.
        """
        if all(self.counts):
            return list(outputs)
        return [o for o, c in zip(outputs, self.counts, strict=True) if c]

    def flat(self, result: Any) -> list[Any]:
        """The outputs of a call in the order of the captured ones.

        Args:
            result: What a model with the same code returned.
        """
        if not self.picked:
            return list(pytree.tree_leaves(result))
        found = {leaf.path: leaf.value for leaf in _leaves(result)}
        return [found.get(path) for path in self.paths]


class Viewer:
    """Sees what a clone returns while it is captured, and makes it something torch.export returns.

    Args:
        model: A clone; a hook stays on it.
        outputs: Which outputs count, see `settled_outputs`.
    """

    def __init__(self, model: nn.Module, outputs: Names | None) -> None:
        self._outputs, self._convention = outputs, convention_of(model)
        self.results: Results | None = None
        model.register_forward_hook(self._returned)

    def _returned(self, _module: nn.Module, _args: Any, result: Any) -> Any:
        leaves = list(_leaves(result))
        picked = not all(leaf.carried for leaf in leaves)
        if picked:
            dropped = [
                _described(leaf) for leaf in leaves if not isinstance(leaf.value, torch.Tensor)
            ]
            leaves = [leaf for leaf in leaves if isinstance(leaf.value, torch.Tensor)]
        else:
            dropped = []
        counts = _counted(leaves, self._outputs, self._auxiliary(result))
        paths = tuple(leaf.path for leaf in leaves)
        self.results = Results(paths, counts, picked, tuple(dropped))
        return {leaf.path: leaf.value for leaf in leaves} if picked else result

    def _auxiliary(self, result: Any) -> frozenset[str]:
        return self._convention.auxiliary(result) if self._convention is not None else frozenset()


def _counted(
    leaves: Sequence[_Leaf], outputs: Names | None, auxiliary: frozenset[str]
) -> tuple[bool, ...]:
    """Which leaves count: those that are named, else all but caches and auxiliary ones."""
    if outputs is not None:
        each = [_named([leaf.path for leaf in leaves], name) for name in outputs]
        return tuple(map(any, zip(*each, strict=True)))
    chosen = [not leaf.within and leaf.path.partition(".")[0] not in auxiliary for leaf in leaves]
    tensors = [isinstance(leaf.value, torch.Tensor) for leaf in leaves]
    if any(c and t for c, t in zip(chosen, tensors, strict=True)):
        return tuple(chosen)
    return (True,) * len(leaves)


def _named(paths: Sequence[str], name: str | int) -> list[bool]:
    """Which paths a name, a glob over names, or a position among the outermost outputs leads to."""
    if isinstance(name, str):
        return [fnmatchcase(p, name) or fnmatchcase(p, f"{name}.*") for p in paths]
    tops = list(dict.fromkeys(path.partition(".")[0] for path in paths))
    at = str(name) if str(name) in tops else None  # a position in a tuple is a name
    if at is None and -len(tops) <= name < len(tops):
        at = tops[name]
    return [at is not None and path.partition(".")[0] == at for path in paths]


def _described(leaf: _Leaf) -> str:
    name = leaf.path or "the result"
    return f"{name} ({type(leaf.value).__name__})"


def names_of(several: Iterable[Results]) -> Names:
    """Names that, as outputs=, make the same outputs count in several example calls.

    Args:
        several: Of each call.
    """
    counted = [p for r in several for p, c in zip(r.paths, r.counts, strict=True) if c]
    return tuple(map(glob.escape, dict.fromkeys(counted)))


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors that a capture returns in place of a result.

    Args:
        result: What a model returned.
    """
    return [leaf.value for leaf in _leaves(result) if isinstance(leaf.value, torch.Tensor)]


# Leaves -------------------------------------------------------------------------------------------


def _leaves(result: Any) -> Iterator[_Leaf]:
    yield from _below(result, (), within=False, known=True, above=())


def _below(
    value: Any, path: tuple[str, ...], *, within: bool, known: bool, above: tuple[int, ...]
) -> Iterator[_Leaf]:
    """Leaves of a value; of what torch.export cannot return, itself and the tensors in it."""
    name = ".".join(path)
    if value is None or isinstance(value, _CARRIED):
        if known or isinstance(value, torch.Tensor):
            yield _Leaf(name, value, known, within)
        return
    children, inside = _registered(value), within
    if children is None:
        if known:
            yield _Leaf(name, value, carried=False, within=within)
        if id(value) in above or len(path) > _LEVELS:
            return
        children, is_container = _members(value)
        inside = within or not (is_container or not path)
        known = False
    for key, child in children:
        yield from _below(
            child, (*path, key), within=inside, known=known, above=(*above, id(value))
        )


def _registered(value: Any) -> list[tuple[str, Any]] | None:
    """Named children of a container that torch.export knows; None where it does not."""
    children, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if spec.is_leaf():
        return None
    if isinstance(value, Mapping) and len(value) == len(children):
        names = [str(key) for key in value]
    elif isinstance(value, tuple) and hasattr(type(value), "__match_args__"):
        names = list(cast(Any, type(value)).__match_args__)
    else:
        held = getattr(value, "__dict__", {}).items()
        known = {id(child): key for key, child in held}
        names = [known.get(id(child), str(i)) for i, child in enumerate(children)]
    return list(zip(names, children, strict=True))


def _members(value: Any) -> tuple[list[tuple[str, Any]], bool]:
    """What an object that torch.export does not know holds, and whether it is a mere container."""
    if isinstance(value, nn.Module | type | types.ModuleType) or callable(value):
        return [], False
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)], True
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()], True
    if isinstance(value, list | tuple):
        return [(str(i), item) for i, item in enumerate(value)], True
    return list(getattr(value, "__dict__", {}).items()), False


# What a user names --------------------------------------------------------------------------------


def settled_outputs(outputs: Outputs) -> Names | None:
    """Names and positions of outputs as a tuple.

    Args:
        outputs: As a user passes them.

    Raises:
        InputError: They are something else, or none.
    """
    if outputs is None:
        return None
    given = (outputs,) if isinstance(outputs, str | int) else outputs
    names = tuple(given) if isinstance(given, list | tuple | set | frozenset) else ()
    plain = all(isinstance(n, str | int) and not isinstance(n, bool) for n in names)
    if not names or not plain:
        raise InputError(f"outputs is {shown(outputs)}", where="outputs=", remedy=_HOW)
    return names


def check_outputs(outputs: Names | None, results: Sequence[Results]) -> None:
    """Refuse names that no example call returns, and calls of which no output counts.

    Args:
        outputs: What was asked for.
        results: Of every example call.

    Raises:
        CaptureError: A call returns no tensor.
        InputError: A name matches nothing, or nothing of a call counts.
    """
    for each in results:
        if each.picked and not each.paths:
            raise CaptureError(
                f"the model returns no tensor, but {listed(list(each.dropped))}",
                where="its outputs",
                remedy="have its forward return tensors, or containers of tensors",
            )
    if outputs is None:
        return
    there = list(dict.fromkeys(path for each in results for path in each.paths))
    for name in outputs:
        if not any(any(_named(each.paths, name)) for each in results):
            raise InputError(
                f"the model returns no output {name!r}",
                where="outputs=",
                remedy=f"it returns {listed([p or 'a tensor, at position 0' for p in there], 20)}",
            )
    for number, each in enumerate(results):
        if not any(each.counts):
            raise InputError(
                f"none of the outputs of example call {number} counts: it returns "
                f"{listed(list(each.paths))}",
                where="outputs=",
                remedy="name one of them, too",
            )
