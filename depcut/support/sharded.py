"""Tensors and modules that torch.distributed shards over processes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from depcut.errors import InputError
from depcut.support.fsdp_private import Sharding, read_sharding, sharded_parameters
from depcut.support.torch_private import composable_records

# Left on the modules that `fully_shard` manages.
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def _loaded(module: str, name: str) -> Any:
    """A class of a part of torch, None where that was not imported: nothing can be of it then."""
    return getattr(sys.modules.get(module), name, None)


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor.

    Args:
        tensor: Any value.
    """
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, to be asked for by all processes; any other as it is.

    Args:
        tensor: The tensor.
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        found: Any = tensor
        # Shards that are offloaded to the CPU; the processes may not talk but on the device.
        found = found.to(found.device_mesh.device_type)
        full: torch.Tensor = found.full_tensor()
    return full.detach()


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was called on.

    Args:
        model: A module; what is none has none.
    """
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    if kind is None or not isinstance(model, nn.Module):
        return []
    return [m for m in model.modules() if isinstance(m, kind)]


def sharding_of(model: nn.Module) -> Sharding | None:
    """How `fully_shard` has sharded a model; None where it was not called.

    Args:
        model: What a user passed as a model; it is only read.

    Raises:
        InputError: It was called in a way that cannot be repeated for a smaller model.
    """
    return read_sharding(model) if fsdp_modules(model) else None


def shards_of(model: nn.Module) -> dict[int, nn.Parameter]:
    """The shards of parameters that `fully_shard` manages, by the id of what is registered.

    That is another tensor while the parameter is gathered, as a root stays after a forward; its
    precision may be lower then.

    Args:
        model: A module; it is only read.
    """
    if not fsdp_modules(model):
        return {}
    held = dict(model.named_parameters(remove_duplicate=False))
    shards = sharded_parameters(model)
    return {id(held[name]): each for name, each in shards.items() if name in held}


def sharded_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, sharded as a parameter of the same shape is.

    Args:
        value: The whole tensor, the same in all processes.
        parameter: The parameter; where it is not sharded, the value is returned on its device.
    """
    if not is_sharded(parameter):
        return value.to(parameter.device)
    from torch.distributed.tensor import DTensor, Shard

    like: Any = parameter
    mesh, part = like.device_mesh, value
    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = torch.chunk(part, mesh.size(dim), placement.dim)
            at = mesh.get_local_rank(dim)
            part = parts[at] if at < len(parts) else part.narrow(placement.dim, 0, 0)
    local = part.to(like.to_local().device, copy=True).contiguous()
    out: torch.Tensor = DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return out


def refuse_fsdp1(model: nn.Module) -> None:
    """Refuse the older wrapper, which flattens parameters into one.

    Args:
        model: A module.

    Raises:
        InputError: It is, or holds, such a wrapper.
    """
    kind = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if kind is not None and any(isinstance(m, kind) for m in modules):
        raise InputError(
            "the model is wrapped by FullyShardedDataParallel, which holds its parameters as "
            "parts of one flat one",
            where=type(model).__name__,
            remedy="use torch.distributed.fsdp.fully_shard, or shrink the model before it is "
            "wrapped",
        )


def records(module: nn.Module) -> list[str]:
    """Names of the attributes in which `fully_shard` and its like note what they did to a module.

    Args:
        module: One module of a model; it is only read.
    """
    fields = vars(module)
    return [name for name in (*_MARKS, *composable_records()) if name in fields]


def is_own_hook(hook: object) -> bool:
    """Whether a hook of a module is torch.distributed's.

    Args:
        hook: The function.
    """
    module = getattr(hook, "__module__", None) or getattr(type(hook), "__module__", "")
    return str(module).startswith("torch.distributed.")


def make_plain(module: nn.Module) -> None:
    """Give a clone of a module that `fully_shard` was called on its own class again.

    Args:
        module: The clone, one module of the tree.
    """
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    if kind is not None and isinstance(module, kind):
        own: Any = next(k for k in type(module).__mro__[1:] if not issubclass(k, kind))
        module.__class__ = own
