"""Which dimension of the example inputs is the batch, and how a capture leaves it open."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from depcut.capture.dry_run import result_shapes
from depcut.support.torch_private import pytree

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Batch(enum.Enum):
    """How the first dimensions of the inputs are captured.

    Attributes:
        FREE: Each may have any size.
        SHARED: Those of the size of the first one have one and the same size.
        FIXED: They have the sizes of the example.
    """

    FREE = ""
    SHARED = "the inputs were captured with one batch size for all of them"
    FIXED = (
        "captured at the batch size of the example alone, because the forward does not trace with "
        "an open one; other batch sizes are not checked"
    )


def ways(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Batch, Arguments]]:
    """In what ways to try to capture, and with which inputs: the freest first.

    Args:
        model: The model whose forward takes the inputs.
        args: Positional inputs, as they were given.
        kwargs: Keyword inputs, as they were given.
    """
    wide = widened(model, args, kwargs)
    yield Batch.FREE, wide
    asked = widened(model, args, kwargs, ask=True)
    sizes = _sizes(asked)
    if sizes != _sizes(wide):
        yield Batch.FREE, asked
    if sizes and sizes.count(sizes[0]) > 1:
        yield Batch.SHARED, asked
    # A failed attempt leaves its marks of open dimensions on the tensors that it was given.
    args, kwargs = pytree.tree_map(_view, (args, kwargs))
    yield Batch.FIXED, (args, kwargs)


def _view(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first size of the first tensor that has one; 1 where none has."""
    return next((t.shape[0] for t in _tensors((args, kwargs))), 1)


def dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch
) -> Any:
    """The argument of torch.export that leaves the first dimension of every tensor open.

    Args:
        model: The model whose forward takes the inputs.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        batch: How the batch is captured.
    """
    if batch is Batch.FIXED:
        return None

    def spec(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.ndim > 0
        return {0: torch.export.Dim.AUTO} if batched else None

    # By parameter; what `*args` takes is nested in it.
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return pytree.tree_map(spec, dict(bound.arguments))


def share_batch(model: nn.Module) -> None:
    """Have a model compare the first sizes of its inputs before its forward, by a hook that stays.

    A trace learns from it that those that are equal in the example are one symbol.
    """

    def compare(_: nn.Module, args: Any, kwargs: Any) -> None:
        first, *others = _tensors((args, kwargs))
        for other in others:
            if other.shape[0] == first.shape[0]:
                continue

    model.register_forward_pre_hook(compare, with_kwargs=True)


def widened(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, ask: bool = False
) -> Arguments:
    """The inputs with a batch of one doubled: a size of one would be captured as a constant.

    Args:
        model: The model that they are for; it says which tensors have a batch where they do not.
        args: Positional inputs.
        kwargs: Keyword inputs.
        ask: Ask the model also where every tensor is one row of several numbers.
    """
    tensors = _tensors((args, kwargs))
    if not tensors or tensors[0].shape[0] != 1:
        return args, kwargs
    single = [i for i, t in enumerate(tensors) if t.shape[0] == 1]
    several = [i for i in single if tensors[i].ndim > 1]
    if len(several) == len(tensors) and (not ask or len(single) == 1):
        return _doubled(args, kwargs, single)
    # One number, or one row beside several, may belong to the batch or to the whole call.
    choices = [single, several, single[:1], []]
    whole = result_shapes(model, args, kwargs)
    chosen = choices[0]
    if whole is not None:
        fits = (c for c in choices if _grows(model, whole, _doubled(args, kwargs, c)))
        chosen = next(fits, chosen)
    return _doubled(args, kwargs, chosen)


def _tensors(arguments: Any) -> list[torch.Tensor]:
    """The tensors among arguments that have a first dimension."""
    leaves = pytree.tree_leaves(arguments)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]


def _sizes(arguments: Arguments) -> list[int]:
    return [t.shape[0] for t in _tensors(arguments)]


def _doubled(args: tuple[Any, ...], kwargs: dict[str, Any], chosen: Collection[int]) -> Arguments:
    """The inputs with some of their tensors, by number, laid twice end to end."""
    picked = {id(t) for i, t in enumerate(_tensors((args, kwargs))) if i in chosen}

    def leaf(value: Any) -> Any:
        return torch.cat([value, value]) if id(value) in picked else value

    args, kwargs = pytree.tree_map(leaf, (args, kwargs))
    return args, kwargs


def _grows(model: nn.Module, whole: list[torch.Size], arguments: Arguments) -> bool:
    """Whether the model takes the inputs, and its results grow by rows alone."""
    wide = result_shapes(model, *arguments)
    return wide is not None and all(
        new == old or (new[:1] == (2,) and old[:1] == (1,) and new[1:] == old[1:])
        for new, old in zip(wide, whole, strict=True)
    )
