"""A smaller model as sharded as the dense one: the same calls of `fully_shard` once more."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from depcut.errors import InputError
from depcut.plan.stacks import Stack, name_now
from depcut.support.fsdp_private import Sharding


def require_even(slim: nn.Module, sharding: Sharding) -> None:
    """Refuse sizes that `fully_shard` cannot shard along another dimension than the first.

    Args:
        slim: The smaller model, layers still numbered as in the dense one.
        sharding: Of the dense model.

    Raises:
        InputError: A size is no multiple of the number of processes.
    """
    for name, parameter in slim.named_parameters(remove_duplicate=False):
        placed = sharding.placed.get(name)
        if placed is None:
            continue
        dim, size = placed.placement.dim, placed.size
        if dim and parameter.shape[dim] % size:
            raise InputError(
                f"dimension {dim} of {parameter.shape[dim]} is sharded over {size} processes, "
                "which fully_shard does in equal parts alone",
                where=name,
                remedy=f"pass align={size}, or a multiple of it",
            )


def shard_alike(
    slim: nn.Module, sharding: Sharding, stacks: Collection[Stack], generated: Collection[str]
) -> None:
    """Shard a smaller model as the dense one is: by the same calls on the modules that stay.

    Args:
        slim: The smaller model, whole on every process; it is changed.
        sharding: Of the dense model.
        stacks: Repeated layers of which some are gone.
        generated: Names of modules whose code was generated. It runs none of the modules inside,
            so what is sharded there is sharded with it.
    """
    from torch.distributed.fsdp import fully_shard

    modules = dict(slim.named_modules(remove_duplicate=False))
    closed = {name_now(name, stacks) for name in generated}
    parameters = dict(slim.named_parameters(remove_duplicate=False))
    chosen = {
        id(parameters[now]): placed.chosen
        for name, placed in sharding.placed.items()
        if (now := name_now(name, stacks)) in parameters
    }
    ignored = {
        parameters[now]: device
        for name, device in sharding.ignored.items()
        if (now := name_now(name, stacks)) in parameters
    }
    for parameter, device in ignored.items():
        parameter.data = parameter.data.to(device, copy=True)  # the others are copied below
    del parameters  # what is sharded frees the whole
    done: set[int] = set()
    for unit in sharding.units:
        names = [name_now(name, stacks) for name in unit.modules]
        found = [modules[_outermost(n, closed)] for n in names if n is not None and n in modules]
        found = [m for m in dict.fromkeys(found) if id(m) not in done]
        if not found:
            continue
        done |= {id(m) for m in found}
        fully_shard(
            found if len(found) > 1 else found[0],
            shard_placement_fn=lambda p: chosen.get(id(p)),
            ignored_params={*ignored},
            **unit.arguments,
        )


def _outermost(name: str, closed: Collection[str | None]) -> str:
    """The outermost closed module that a module is in, or it itself."""
    parts = name.split(".")
    around = ("", *(".".join(parts[:i]) for i in range(1, len(parts))))
    return next((outer for outer in around if outer in closed and outer != name), name)
