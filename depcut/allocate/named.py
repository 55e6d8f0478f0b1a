"""Groups by globs over the names of modules and parameters."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from depcut.coupling.groups import Coupling, Group, layer_of
from depcut.errors import InputError


def matching(coupling: Coupling, pattern: str, option: str) -> set[int]:
    """Numbers of the groups that a glob names.

    Args:
        coupling: The groups.
        pattern: A glob over module, parameter or group names.
        option: Where the user passed it.

    Raises:
        InputError: The model has nothing of that name.
    """
    numbers = {g.index for g in coupling.groups if _matches(g, pattern)}
    names = {layer_of(n) for n in coupling.dims} | set(coupling.dims)
    known = any(fnmatchcase(n, pattern) or n.startswith(pattern + ".") for n in names)
    if not numbers and not known:
        close = difflib.get_close_matches(pattern, sorted(names), 3, 0.4)
        raise InputError(
            f"{pattern!r} matches no module, parameter or group",
            where=option,
            remedy=f"did you mean {', '.join(close)}?" if close else "see print(analysis)",
        )
    return numbers


def _matches(group: Group, pattern: str) -> bool:
    for member in group.members:
        if member.role == "producer" and is_named(member.tensor, pattern):
            return True
    # A group's own name may hold brackets, which a glob reads as a choice of characters.
    return pattern == group.name or fnmatchcase(group.name, pattern)


def is_named(tensor: str, pattern: str) -> bool:
    """Whether a glob over module or parameter names matches this parameter.

    Args:
        tensor: Name of a parameter.
        pattern: The glob; the name of a module means all that it contains.
    """
    layer = layer_of(tensor)
    names = fnmatchcase(tensor, pattern) or fnmatchcase(layer, pattern)
    return names or layer.startswith(pattern + ".")
