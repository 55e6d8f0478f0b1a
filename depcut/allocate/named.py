"""Groups that a user names by globs over modules and parameters: held, or of a given share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from depcut.allocate.space import StepTie
from depcut.coupling.groups import Coupling, Group, layer_of
from depcut.errors import InputError
from depcut.support.checks import check_number
from depcut.support.failures import shown


def check_ratio(ratio: object, where: str) -> None:
    """Refuse what is no fraction strictly between 0 and 1.

    Args:
        ratio: What the user passed.
        where: Name of the argument.

    Raises:
        InputError: It is something else.
    """
    what = f"the ratio is {shown(ratio)}; it is the fraction removed, between 0 and 1 exclusive"
    remedy = "pass e.g. 0.5 to remove half"
    check_number(ratio, "ratio", remedy, above=0, below=1, what=what, where=where)


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


def held_by(coupling: Coupling, ignore: Iterable[str]) -> set[int]:
    """Numbers of the groups that some globs name.

    Args:
        coupling: The groups.
        ignore: Globs over module, parameter or group names.
    """
    return {i for p in ignore for i in matching(coupling, p, "ignore=")}


def fixed_by(
    coupling: Coupling, ratios: Mapping[str, float], held: set[int], together: Iterable[StepTie]
) -> dict[int, int]:
    """Kept counts, by number, of groups that the budget does not decide.

    Args:
        coupling: The groups.
        ratios: Fraction of units removed, by glob.
        held: Groups that keep all their units, whatever ratios say.
        together: Groups that shrink in common steps.
    """
    fixed: dict[int, int] = {}
    for pattern, ratio in ratios.items():
        if ratio != 0:
            check_ratio(ratio, f"ratios[{pattern!r}]")
        for index in matching(coupling, pattern, "ratios="):
            size = coupling.groups[index].size
            fixed[index] = max(1, size - round(size * ratio))
    by_tie: dict[int, int] = {}
    for index, count in fixed.items():
        tie = coupling.groups[index].tied
        if tie is not None:
            by_tie[tie] = min(count, by_tie.get(tie, count))
    for group in coupling.groups:
        if group.tied in by_tie:
            fixed[group.index] = by_tie[group.tied]
    for each in together:
        sizes = {i: coupling.groups[i].size for i in each.groups}
        steps = [fixed[i] * each.steps // size for i, size in sizes.items() if i in fixed]
        if steps:
            fixed |= {i: size * max(1, min(steps)) // each.steps for i, size in sizes.items()}
    return {i: n for i, n in fixed.items() if i not in held}
