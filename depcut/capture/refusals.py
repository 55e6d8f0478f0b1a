"""Models and inputs that are refused before any work is done."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from depcut.errors import CaptureError, DepcutError, InputError, listed
from depcut.support.torch_private import inner_tensors, is_packed
from depcut.support.unwrap import unwrapped


def check_model(model: object) -> None:
    """Refuse what cannot be rewritten: no module, scripted, quantized, non-finite weights.

    Raises:
        CaptureError: The model is scripted or quantized.
        InputError: It is no module, or its weights are not finite.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is scripted (torch.jit): its code cannot be rewritten",
            where=type(model).__name__,
            remedy="pass the nn.Module it was scripted from",
        )
    model = check_module(model)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.distributed.fsdp"):
            raise CaptureError(
                f"the model is distributed: {type(module).__name__} holds parts of its weights",
                where=f"layer {name!r}",
                remedy="shrink the model before it is sharded, or gather its weights first",
            )
        quantized = ".quantized" in type(module).__module__ and is_packed(module)
        scripted = isinstance(module, torch.jit.ScriptModule)
        if quantized or scripted or ".quantized.modules" in type(module).__module__:
            kind = "scripted" if scripted else "quantized"
            raise CaptureError(
                f"the model holds a {kind} module: {type(module).__name__}",
                where=f"layer {name!r}",
                remedy=f"shrink the model first, then have it {kind}",
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor).__module__.startswith("torch.distributed"):
            raise CaptureError(
                f"the model is distributed: its weights are parts of a {type(tensor).__name__}",
                where=name,
                remedy="shrink the model before it is sharded, or gather its weights first",
            )
        if tensor.is_quantized or _holds_integers(tensor):
            layer, _, own = name.rpartition(".")
            raise CaptureError(
                f"the model holds a quantized tensor: {own} is a {type(tensor).__name__}",
                where=f"layer {layer!r}",
                remedy="shrink the model in floating point first, then quantize the smaller one",
            )
        if isinstance(tensor, nn.Parameter) and not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{bad} of {tensor.numel()} weights are not finite (NaN or infinite)",
                where=name,
                remedy="repair the checkpoint; a ranking of such weights would mean nothing",
            )


def check_module(
    model: object, name: str = "model", error: type[DepcutError] = InputError
) -> nn.Module:
    """Refuse what is no module, or one whose parameters have no shapes yet; return the module.

    A wrapper of torch.compile or data parallelism is left away.

    Args:
        model: What the user passed.
        name: As what.
        error: What to raise.

    Raises:
        InputError: It is something else; as `error`.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        is_class = isinstance(model, type) and issubclass(model, nn.Module)
        got = f"the class {model.__name__}" if is_class else f"a {type(model).__name__}"  # type: ignore[attr-defined]
        raise error(
            f"{name} is {got}, not a torch.nn.Module",
            where=name,
            remedy="pass an instance of it" if is_class else "pass the module itself",
        )
    for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise error(
                "the model's lazy parameters have no shapes yet",
                where=tensor_name,
                remedy="run the model once on an example, model(x), which settles them",
            )
    return model


def signature_of(model: nn.Module) -> inspect.Signature:
    """What a model's forward takes.

    Raises:
        InputError: It cannot be told.
    """
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"what the model takes cannot be told: {error}",
            where=f"{type(model).__name__}.forward",
            remedy="write forward as a Python function",
        ) from error


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that the model's forward does not take.

    Raises:
        InputError: Names the argument and the signature.
    """
    signature = signature_of(model)
    try:
        kinds = {p.kind for p in signature.parameters.values()}
        unknown = [k for k in kwargs if k not in signature.parameters]
        if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise TypeError(f"unexpected keyword {listed(unknown)}")
        signature.bind(*args, **kwargs)
    except TypeError as error:
        one = len(signature.parameters) == 1 and not args
        raise InputError(
            f"the model does not take these inputs: {error}",
            where=f"{type(model).__name__}.forward{signature}",
            remedy="pass inputs= as a tuple of its positional or a dict of its keyword arguments"
            + (", ({...},) if it takes one dict" if one else ""),
        ) from None


def _holds_integers(tensor: torch.Tensor) -> bool:
    """Whether a tensor of real numbers is stored as integers and scales, as torchao has it."""
    if tensor.is_nested or not tensor.is_floating_point():
        return False
    inner = inner_tensors(tensor)
    return any(_holds_integers(one) or not one.is_floating_point() for one in inner)


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    # The sum is a cheap first look; it may overflow where every value is finite.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
