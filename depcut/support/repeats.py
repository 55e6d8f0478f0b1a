"""Names that differ in an index only, as one: `layers.{0..23}.mlp`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

# A whole part of a name ("layers.3"), or the end of one that holds others ("block3.conv"). The
# number of a layer itself ("conv1") tells different things apart.
_INDEX = re.compile(r"(?:(?<=^)|(?<=\.))\d+(?=[.\[#]|$)|(?<=[A-Za-z_])\d+(?=\.)")
_MOST_RUNS = 4

Template = tuple[str, ...]


def template(name: str) -> Template:
    """What a name has in common with those that differ in indices only.

    Args:
        name: Of a module or tensor.

    Returns:
        The texts between its indices.
    """
    return tuple(_INDEX.split(name))


def label(names: Iterable[str]) -> str:
    """Names of one template as one, with the values that each index takes.

    Args:
        names: At least one, all of one template. Not every combination of the indices need be
            among them.
    """
    listed = list(names)
    values = zip(*(map(int, _INDEX.findall(name)) for name in listed), strict=True)
    texts = [_runs(sorted(set(column))) for column in values]
    between = template(listed[0])
    return between[0] + "".join(a + b for a, b in zip(texts, between[1:], strict=True))


def collapsed(names: Iterable[str]) -> list[str]:
    """Names with those of one template as one, in the order of the first of each.

    Args:
        names: Any names.
    """
    alike: dict[Template, list[str]] = {}
    for name in names:
        alike.setdefault(template(name), []).append(name)
    return [label(group) for group in alike.values()]


def _runs(values: list[int]) -> str:
    """Ascending numbers as text: 5, {0,1}, {0..23}, {0,2..22}."""
    if len(values) == 1:
        return str(values[0])
    steps = {b - a for a, b in itertools.pairwise(values)}
    if len(values) > 3 and len(steps) == 1 and steps != {1}:
        return f"{{{values[0]},{values[1]}..{values[-1]}}}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
    if len(texts) > _MOST_RUNS:
        texts = [*texts[:_MOST_RUNS], f"..{values[-1]}"]
    return "{" + ",".join(texts) + "}"
