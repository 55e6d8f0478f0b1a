"""Why a layer can or cannot shrink, in words."""

from __future__ import annotations

import difflib

from depcut import axes
from depcut.coupling.groups import Coupling, layer_of
from depcut.errors import InputError, listed
from depcut.support.checks import check_kind


def explanation(coupling: Coupling, name: str) -> str:
    """The groups and frozen dimensions of a layer, a line for each dimension of its tensors.

    Args:
        coupling: The analysed architecture.
        name: A module or parameter name.

    Raises:
        InputError: The model has no such layer.
    """
    check_kind(name, str, "name", "pass the name of a module or parameter")
    tensors = [
        n for n in coupling.dims if n == name or layer_of(n) == name or n.startswith(name + ".")
    ]
    if not tensors:
        names = sorted({layer_of(n) for n in coupling.dims})
        close = difflib.get_close_matches(name, names, 3, 0.4)
        raise InputError(
            f"the model has no layer {name!r} with parameters",
            where="explain",
            remedy=f"did you mean {', '.join(close)}?" if close else f"layers: {listed(names)}",
        )
    lines = [name]
    for tensor in tensors:
        lines += [
            f"  {tensor} dim {dim} ({term.size}): {_term(coupling, term, tensor, dim)}"
            for dim, term in enumerate(coupling.dims[tensor])
        ]
    return "\n".join(lines)


def _term(coupling: Coupling, term: axes.Term, tensor: str, dim: int) -> str:
    """What holds one dimension."""
    index, texts = coupling.group_of, []
    for leaf in dict.fromkeys(axes.leaves(term)):
        group = index.get(leaf)
        if group is not None:
            others = [layer_of(m.tensor) for m in group.members if m.tensor != tensor]
            others = list(dict.fromkeys(others))
            texts.append(
                f"group {group.name!r}, {group.size} units"
                + (f", with {listed(others, 6)}" if others else "")
                + (f", as many as its tie {group.tied}" if group.tied is not None else "")
                + f", chosen in each of {group.rows} rows" * (group.row_axis is not None)
            )
    texts += [
        f"frozen: {frozen.reason} [{frozen.where}]"
        for frozen in coupling.frozen
        if (frozen.tensor, frozen.dim) == (tensor, dim)
    ]
    return "; ".join(texts) or "stays: one index"
