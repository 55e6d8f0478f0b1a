"""What `fully_shard` was called with, read off the modules that it changed.

Every private name of torch.distributed.fsdp that depcut uses; all were read in torch 2.13.

| name | why |
|---|---|
| `FSDPModule._get_fsdp_state` | nothing public says how a module was sharded |
| `FSDPState._fsdp_param_groups`, `_modules`, `_mp_policy` | the same |
| `FSDPState._auto_reshard_after_forward` | that reshard_after_forward was not given |
| `FSDPParam._module_info` | the name of a sharded parameter, also while it is gathered |
| `_fully_shard._fsdp_common.ShardPlacementResult` | a parameter with a mesh of its own |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depcut.errors import InputError

_REMEDY = (
    "apply the plan to the model before it is sharded (plan = depcut.analyze(model).plan(ratio); "
    "plan.apply(plain_model)), and shard the result"
)


@dataclass(frozen=True)
class Placed:
    """How one parameter is sharded.

    Attributes:
        parameter: Its shards, a DTensor.
        placement: The `Shard` that says along which dimension.
        size: Over how many processes.
        chosen: What a `shard_placement_fn` is to return for it.
    """

    parameter: nn.Parameter
    placement: Any
    size: int
    chosen: Any


@dataclass(frozen=True)
class Unit:
    """What one call of `fully_shard` got.

    Attributes:
        modules: Names of the modules, one or several.
        arguments: The keywords, but for those that say it parameter by parameter.
    """

    modules: tuple[str, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded.

    Attributes:
        units: The calls of `fully_shard`, inner modules first.
        placed: How each parameter is sharded, by each of its names.
        ignored: Where the parameters are that are not sharded, by each of their names:
            `fully_shard` was told to ignore them, or was not called on what holds them.
    """

    units: tuple[Unit, ...]
    placed: dict[str, Placed]
    ignored: dict[str, torch.device]


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The shards of what `fully_shard` manages, by name, also of what is gathered at the moment.

    Args:
        model: A module; it is only read.
    """
    return {name: param.sharded_param for _, _, names, param in _managed(model) for name in names}


def read_sharding(model: nn.Module) -> Sharding | None:
    """How `fully_shard` has sharded a model; None where it was not called.

    Args:
        model: A module; it is only read.

    Raises:
        InputError: It was called in a way that cannot be repeated for a smaller model.
    """
    states = _states(model)
    if not states:
        return None
    placed: dict[str, Placed] = {}
    for state, group, names, param in _managed(model):
        _require_repeatable(group.mesh_info, param, names[0])
        own = group is not state._fsdp_param_groups[0]
        chosen = _with_mesh(param.fsdp_placement, group.mesh_info) if own else param.fsdp_placement
        size = group.mesh_info.shard_mesh_size
        each = Placed(param.sharded_param, param.fsdp_placement, size, chosen)
        placed.update(dict.fromkeys(names, each))
    groups = [group for state in states for group in state._fsdp_param_groups]
    found = {id(m): name for name, m in model.named_modules()}
    units = []
    for state in states:
        first = next(iter(state._fsdp_param_groups), None)
        # One without parameters of its own does not say where it would have put them.
        known = first or next(iter(groups), None)
        arguments = {"mp_policy": state._mp_policy}
        if known is not None:
            arguments |= {"mesh": known.mesh_info.mesh, "offload_policy": known.offload_policy}
        if first is not None and not state._auto_reshard_after_forward:
            arguments["reshard_after_forward"] = _reshards(first)
        units.append(Unit(tuple(found[id(m)] for m in state._modules), arguments))
    held = model.named_parameters(remove_duplicate=False)
    ignored = {name: p.device for name, p in held if name not in placed}
    return Sharding(tuple(units), placed, ignored)


def _states(model: nn.Module) -> list[Any]:
    """What each call of `fully_shard` left, inner modules first."""
    from torch.distributed.fsdp import FSDPModule

    managed = [m for m in model.modules() if isinstance(m, FSDPModule)]
    states = {id(state): state for m in managed for state in [m._get_fsdp_state()]}
    return list(states.values())[::-1]


def _managed(model: nn.Module) -> Iterator[tuple[Any, Any, tuple[str, ...], Any]]:
    """(state, group, names, parameter) of each sharded parameter."""
    found = {id(m): name for name, m in model.named_modules()}
    for state in _states(model):
        for group in state._fsdp_param_groups:
            for param in group.fsdp_params:
                info = param._module_info
                owners = (
                    (info.module, info.param_name),
                    *zip(info.shared_modules, info.shared_param_names, strict=True),
                )
                names = [(found[id(m)], name) for m, name in owners if id(m) in found]
                if names:
                    yield state, group, tuple(f"{m}.{n}" if m else n for m, n in names), param


def _require_repeatable(mesh_info: Any, param: Any, name: str) -> None:
    what = ""
    if getattr(mesh_info, "shard_mesh_size", None) is None:
        what = "replicated, not sharded, by torch.distributed"
    elif param.is_dtensor:
        what = "sharded by another call (tensor parallelism) before fully_shard"
    if what:
        raise InputError(
            f"a parameter is {what}, which is not done to a smaller one again",
            where=name,
            remedy=_REMEDY,
        )


def _reshards(group: Any) -> bool | int:
    after, mesh_info = group.post_forward_mesh_info, group.mesh_info
    if after is None or after is mesh_info:
        return after is not None
    size: int = after.shard_mesh_size
    return True if size == mesh_info.shard_mesh_size else size


def _with_mesh(placement: Any, mesh_info: Any) -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

    return ShardPlacementResult(placement, mesh_info)
