"""Take modules and parameters of dropped branches out of the smaller model."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from depcut.capture.program import parent_of
from depcut.plan.keep import Keep
from depcut.support.torch_private import children_of, parameters_of


def remove_dead(slim: nn.Module, keep: Keep, generated: Collection[str]) -> None:
    """Delete what only dropped branches used; the names of everything else stay as they are.

    In a list of modules, whose entries are known by number, an identity takes the dead one's place.

    Args:
        slim: The smaller model, whose code does not call these modules any more; changed in place.
        keep: What stays.
        generated: Modules whose lines were generated, there or in an enclosing module.
    """
    gone, program = keep.gone, keep.coupling.program
    called = {"", *(call.module for call in program.calls)}
    for name in sorted(gone.modules):
        parent, _, key = name.rpartition(".")
        if not _exists(slim, name):
            continue  # within another one
        caller = parent
        while caller not in called:
            caller = parent_of(caller)
        holds = any(True for _ in slim.get_submodule(name).parameters())
        if not holds and caller not in generated:
            continue
        holder = slim.get_submodule(parent)
        if parent in called:
            del children_of(holder)[key]
        else:
            children_of(holder)[key] = nn.Identity()
    for name in sorted(gone.tensors & program.parameters):
        owner, _, key = name.rpartition(".")
        if _exists(slim, owner):
            parameters_of(slim.get_submodule(owner)).pop(key, None)


def _exists(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
