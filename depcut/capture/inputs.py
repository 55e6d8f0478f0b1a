"""Example inputs: the forms a user may pass, and inference where they are left out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from depcut.capture.batches import widened
from depcut.capture.convention import Convention, convention_of
from depcut.capture.dry_run import failure, result_shapes
from depcut.capture.refusals import signature_of
from depcut.errors import InputError, in_call, listed
from depcut.support.failures import reraise_fatal
from depcut.support.torch_private import pytree

Inputs = torch.Tensor | tuple[Any, ...] | list[Any] | dict[str, Any] | None
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the (args, kwargs) of an example call

_CANDIDATES = 40  # of a library's example inputs that are tried
USUAL_SIZES = (224, 32, 28, 64, 96, 256, 299, 384, 512)
_HOW = "pass a tensor, a tuple of positional arguments or a dict of keyword arguments"
_SEVERAL = (
    "a list holds several example calls, each a tensor, a tuple of positional arguments or a dict "
    "of keyword arguments; the positional arguments of one call are a tuple"
)


def normalize(
    model: nn.Module, inputs: Inputs, *, widen: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) on the model's device, with a batch of at least two.

    Args:
        model: The model they are for.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; None infers them
            from the model's `dummy_inputs` or its first layer.
        widen: Whether to double a batch of one.

    Raises:
        InputError: The inputs have another kind, or cannot be inferred.
    """
    args, kwargs = arguments(infer_inputs(model) if inputs is None else inputs)
    args, kwargs = with_settings(model, args, kwargs)
    device = device_of(model)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    refuse_without_values((args, kwargs), device)
    if not any(t.numel() for t in tensors):
        raise InputError(
            f"the inputs are empty: {listed([str(tuple(t.shape)) for t in tensors], 3)}",
            where="inputs=",
            remedy="pass an example with values: what is computed on none cannot be compared",
        )

    def prepare(leaf: Any) -> Any:
        return leaf.detach().to(device) if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(prepare, (args, kwargs))
    return widened(model, args, kwargs) if widen else (args, kwargs)


def example_calls(model: nn.Module, inputs: Inputs = None, *, widen: bool = True) -> list[Call]:
    """The (args, kwargs) of every example call, each as of `normalize`.

    Args:
        model: The model they are for.
        inputs: What one call takes, see `normalize`; or a list of that, one item a call.
        widen: Whether to double a batch of one.

    Raises:
        InputError: The list is empty, or an item is no tensor, tuple or dict, or see `normalize`.
    """
    if not isinstance(inputs, list):
        return [normalize(model, inputs, widen=widen)]
    if not inputs:
        raise InputError("inputs is an empty list", where="inputs=", remedy=_SEVERAL)
    for number, call in enumerate(inputs):
        if not isinstance(call, torch.Tensor | tuple | Mapping):
            raise InputError(
                f"inputs is a list, so that each item is an example call, and item {number} is of "
                f"type {type(call).__name__}",
                where=f"inputs[{number}]",
                remedy=_SEVERAL,
            )
    calls = []
    for number, call in enumerate(inputs):
        with in_call(number, len(inputs)):
            calls.append(normalize(model, call, widen=widen))
    return calls


def only_call(inputs: Any) -> Any:
    """What one call takes, where a list of example calls holds no more than one.

    Args:
        inputs: As a user passes them.

    Raises:
        InputError: They are several example calls.
    """
    if not isinstance(inputs, list) or not inputs:
        return inputs
    if len(inputs) > 1:
        raise InputError(
            f"inputs is a list of {len(inputs)} example calls, and one is wanted here",
            where="inputs=",
            remedy="pass one of them; several positional arguments of one call are a tuple",
        )
    return inputs[0]


def arguments(inputs: Inputs, where: str = "inputs=") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of what a user passes as inputs, as they are.

    Args:
        inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        where: What they were passed as, for messages.

    Raises:
        InputError: It is something else, or holds no tensor.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, torch.Tensor):
        args = (inputs,)
    elif isinstance(inputs, tuple | list):
        args = tuple(inputs)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        name, array = where.removesuffix("="), isinstance(inputs, np.ndarray)
        remedy = "pass torch.from_numpy(array)" if array else _HOW
        raise InputError(f"{name} is a {type(inputs).__name__}", where=where, remedy=remedy)
    try:
        leaves = pytree.tree_leaves((args, kwargs))
    except RecursionError as error:
        raise InputError(
            f"{where.removesuffix('=')} is nested too deeply", where=where, remedy=_HOW
        ) from error
    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
        raise InputError(
            f"{where.removesuffix('=')} holds a NumPy array",
            where=where,
            remedy="pass torch.from_numpy(array)",
        )
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise InputError(f"{where.removesuffix('=')} holds no tensor", where=where, remedy=_HOW)
    return args, kwargs


def with_settings(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Arguments of a call, and those that the model's library has for a capture (no cache).

    Args:
        model: The model they are for.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    convention = convention_of(model)
    if convention is None:
        return args, kwargs
    named = dict(zip(signature_of(model).parameters, args, strict=False))
    settings = convention.settings(model, [*named, *kwargs])
    # A call is either positional or by keywords in all that is made of it.
    return ((), {**named, **kwargs, **settings}) if settings else (args, kwargs)


def refuse_without_values(tree: Any, device: torch.device) -> None:
    """Refuse sparse tensors, and those on the meta device for a model that has values.

    Args:
        tree: Arguments.
        device: The model's.

    Raises:
        InputError: There is one.
    """
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.is_meta and device.type != "meta":
            raise InputError(
                f"an input of shape {tuple(leaf.shape)} is on the meta device, the model on "
                f"{device}",
                where="inputs=",
                remedy="pass tensors with values; their device is changed where it must be",
            )
        sparse = isinstance(leaf, torch.Tensor) and not leaf.is_nested
        if sparse and leaf.layout is not torch.strided:
            raise InputError(
                f"an input of shape {tuple(leaf.shape)} is sparse",
                where="inputs=",
                remedy="pass x.to_dense(): what reads it can be compared with values alone",
            )


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU where there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def infer_inputs(model: nn.Module) -> Inputs:
    """Example inputs as its library has them, from its own dummy inputs, or from its first layer.

    Raises:
        InputError: The first layer leaves it open, or no usual size runs.
    """
    convention = convention_of(model)
    if convention is not None:
        return _by_convention(model, convention)
    dummy = _dummy_inputs(model)
    if dummy is not None:
        return dummy
    first = next((m for m in model.modules() if isinstance(m, _FIRST)), None)
    if first is None:
        raise InputError(
            "the inputs cannot be inferred: the model holds no Conv, Linear or Embedding layer",
            where=type(model).__name__,
            remedy=f"{_HOW}, e.g. depcut.shrink(model, 0.5, torch.randn(2, 3, 224, 224))",
        )
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tried = []
    for shape in _candidates(first):
        if isinstance(first, nn.Embedding):
            example = torch.randint(0, first.num_embeddings, shape, generator=generator)
        else:
            example = torch.randn(shape, generator=generator).to(dtype)
        example = example.to(device_of(model))
        if result_shapes(model, (example,), {}) is not None:
            return example
        tried.append(str(tuple(shape)))
    raise InputError(
        f"the inputs cannot be inferred: none of the shapes {', '.join(tried)} runs",
        where=type(model).__name__,
        remedy=f"{_HOW}, with a batch of 2",
    )


def _by_convention(model: nn.Module, convention: Convention) -> Inputs:
    """The first candidate of a library that the model takes."""
    tried: list[dict[str, Any]] = []
    problem = "no argument of it has a name that the library agrees on"
    for candidate in islice(convention.example_inputs(model), _CANDIDATES):
        _, kwargs = with_settings(model, (), candidate)
        why = failure(model, (), kwargs)
        if not why:
            return candidate
        problem = problem if tried else f"on {shapes_of(candidate)} the model itself raises {why}"
        tried.append(candidate)
    others = f", and on {len(tried) - 1} others, too" if len(tried) > 1 else ""
    raise InputError(
        f"no example inputs can be made: {problem}{others}",
        where=f"{type(model).__name__}.forward",
        remedy="pass inputs= as a dict of its keyword arguments, with a batch of 2",
    )


def shapes_of(inputs: Inputs) -> str:
    """Names, data types and shapes of inputs, in words.

    Args:
        inputs: What one call takes.
    """
    args, kwargs = arguments(inputs)
    named = {**{str(i): a for i, a in enumerate(args)}, **kwargs}

    def one(name: str, value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return f"{name}={value!r}" if isinstance(value, int | float | str | None) else name
        kind = str(value.dtype).removeprefix("torch.")
        return f"{'' if name.isdigit() else name + ' '}{kind} {list(value.shape)}"

    return ", ".join(one(name, value) for name, value in named.items())


def made_note(inputs: Inputs) -> str:
    """That example inputs were made, in words.

    Args:
        inputs: What `infer_inputs` returned.
    """
    return f"the example inputs were made: {shapes_of(inputs)}; pass inputs= for others"


_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)


def _candidates(first: nn.Module) -> list[tuple[int, ...]]:
    if isinstance(first, nn.Linear):
        return [(2, first.in_features), (2, 16, first.in_features)]
    if isinstance(first, nn.Embedding):
        return [(2, 16), (2, 32), (2, 64), (2, 128), (2, 8)]
    assert isinstance(first, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    rank = len(first.kernel_size)
    sizes = USUAL_SIZES if rank < 3 else (32, 16, 64, 112)
    return [(2, first.in_channels, *([size] * rank)) for size in sizes]


def _dummy_inputs(model: nn.Module) -> dict[str, Any] | None:
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception as error:  # noqa: BLE001  a property of the user's class
        reraise_fatal(error)
        return None
    if not isinstance(dummy, dict):
        return None
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if "input_ids" in dummy and isinstance(vocabulary, int):
        dummy = {**dummy, "input_ids": dummy["input_ids"] % vocabulary}
    return dummy
