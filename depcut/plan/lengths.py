"""Which numbers of the code may be others in another call: lengths, image sizes, the batch."""

from __future__ import annotations

from depcut import axes
from depcut.capture.provenance import OPERATORS, Expr
from depcut.coupling.groups import Coupling


def is_fixed(expr: Expr, coupling: Coupling) -> bool:
    """Whether no size in an expression is the input's: all are widths of the weights.

    Args:
        expr: Where a number comes from.
        coupling: The analysed architecture.
    """
    if not isinstance(expr, tuple) or expr[0] == "attr":
        return True
    if expr[0] in OPERATORS:
        return all(is_fixed(part, coupling) for part in expr[1:3])
    node = coupling.program.marks.get(expr[1])
    dims = coupling.env.get(node) if node is not None else None
    if not isinstance(dims, tuple):
        return False
    read = dims[expr[2] : expr[2] + 1] if expr[0] == "size" else dims
    leaves = (leaf for term in read for leaf in axes.leaves(axes.resolve(term)))
    return all(leaf in coupling.weight_axes for leaf in leaves)
