"""The dense architecture that a stored model is made of: built without values where it can be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depcut.capture.held import held_tensors
from depcut.capture.random_state import preserved
from depcut.capture.refusals import check_module
from depcut.errors import DepcutError, InputError
from depcut.integrations.architectures import built_from, recipe_of
from depcut.rewrite.copying import copied, like
from depcut.storage.names import imported, is_importable, name_of
from depcut.storage.rebuild import Rebuild
from depcut.storage.tensors import Loaded
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.unwrap import unwrapped


def architecture_of(
    model: nn.Module, kind: str, data: dict[str, Any], shapes: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """How the dense architecture of a model can be built, as far as can be told.

    What a library is said to build is built, and made the model, on the meta device.

    Args:
        model: The smaller model.
        kind: Name of its class.
        data: Its description.
        shapes: Of the model that the first plan was made for.
        folder: Where a configuration is written.

    Returns:
        Name of the class and of the library, with what that takes; `why` no library builds it.
    """
    recipe = recipe_of(model, folder)
    if recipe is None:
        return {"class": kind, "library": None}
    architecture = {"class": kind, **recipe}
    try:
        built = build(architecture, folder)
        check_shapes(built, data, shapes, "")
        Rebuild(data, Loaded(data["tensors"], None, torch.device("meta")), "").model(built)
    except DepcutError as error:
        return {"class": kind, "library": None, "why": error.what}
    return architecture


def build(architecture: dict[str, Any], folder: Path) -> nn.Module:
    """The dense architecture that the folder tells of, without values where it can be.

    Args:
        architecture: What `architecture_of` gave.
        folder: Where the configuration is.

    Raises:
        InputError: The folder does not tell how, or it cannot be built.
    """
    name = architecture["class"]
    short = name.rpartition(":")[2]
    remedy = f"pass what makes it: depcut.load(folder, {short}), a function, or a model"
    where = str(folder)
    if not is_importable(name):
        raise InputError(f"the class {short} cannot be imported", where=where, remedy=remedy)
    kind = imported(name, where) if architecture["library"] != "timm" else None
    if architecture["library"] is not None:
        return _without_values(lambda: built_from(architecture, kind, folder), where)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"{name} is no torch.nn.Module", where=where, remedy=remedy)
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the folder does not tell the arguments of {short}: {error}",
            where=where,
            remedy=f"pass what makes the model: depcut.load(folder, lambda: {short}(...))",
        ) from error
    return _without_values(kind, f"{short}()")


def given(net: Any) -> nn.Module:
    """The dense architecture that a user passed, without values where it can be.

    Args:
        net: A class or function that makes it, called without arguments; or a model, which is only
            read.

    Raises:
        InputError: It makes none.
    """
    if isinstance(net, nn.Module):
        return _skeleton(unwrapped(check_module(net, "net")))
    if not callable(net):
        raise InputError(
            f"net is a {type(net).__name__}",
            where="net=",
            remedy="pass a class or function that makes the dense model, or such a model",
        )
    return _without_values(net, name_of(net).rpartition(":")[2])


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a module tree whose tensors have no values."""
    memo: dict[int, Any] = {}
    for tensor in held_tensors(model).values():
        memo[id(tensor)] = like(tensor, torch.empty_like(tensor.detach(), device="meta"))
    built: nn.Module = copied(model, memo)
    return built


def _without_values(make: Callable[[], Any], where: str) -> nn.Module:
    """What a function makes on the meta device; on the CPU, where its code reads values."""
    with preserved():
        try:
            with torch.device("meta"):
                built = make()
        except Exception as refusal:  # noqa: BLE001  (of the user's code: it may need values)
            reraise_fatal(refusal)
            built = _with_values(make, where)
    return check_module(built, where)


def _with_values(make: Callable[[], Any], where: str) -> Any:
    try:
        return make()
    except DepcutError:
        raise
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the dense model cannot be built: {first_line(error)}",
            where=where,
            remedy="pass a class or function that makes it when it is called without arguments",
        ) from error


def _shapes(data: dict[str, Any], number: int = 0, path: str = "") -> dict[str, list[int]]:
    """Shapes of parameters and buffers, by each of the names that they have."""
    record = data["modules"][number]
    slots = {**record["parameters"], **record["buffers"]}
    found = {f"{path}{n}": data["tensors"][i]["shape"] for n, i in slots.items() if i is not None}
    for name, child in record["children"].items():
        found |= {} if child is None else _shapes(data, child, f"{path}{name}.")
    return found


def check_shapes(
    built: nn.Module, data: dict[str, Any], dense: dict[str, list[int]], remedy: str
) -> None:
    """Refuse an architecture that no plan of the stored model was made for.

    Args:
        built: What was built.
        data: The stored model, as `Description.data`.
        dense: Shapes of the model that the first plan was made for, by name.
        remedy: What to do.

    Raises:
        InputError: A tensor has neither the dense nor the smaller shape, or is unknown.
    """
    slim = _shapes(data)
    state: dict[str, Tensor] = built.state_dict(keep_vars=True)
    for name, tensor in state.items():
        known = [shapes[name] for shapes in (dense, slim) if name in shapes]
        if list(tensor.shape) not in [list(shape) for shape in known]:
            have = f"{name} of the one at hand has the shape {list(tensor.shape)}"
            wanted = f"the plan's has {known[0]}" if known else "the plan knows none of that name"
            raise InputError(
                f"the folder holds another architecture: {have}, {wanted}",
                where=name_of(type(built)),
                remedy=remedy,
            )
