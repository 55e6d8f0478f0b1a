"""Terms and size literals of a graph that runs on inputs of another length than the captured."""

from __future__ import annotations

from torch import fx

from depcut import axes
from depcut.axes import Axis, Product, Term
from depcut.capture.program import where
from depcut.coupling.groups import Coupling
from depcut.errors import InputError
from depcut.graph.resized import Resized
from depcut.ops.registry import Literal
from depcut.plan.keep import Keep

_REMEDY = "pass data of one length, that of inputs= (a DataLoader that pads all batches alike)"


def check_terms(keep: Keep, resized: Resized) -> None:
    """Refuse a graph in which a narrowed dimension holds a length behind a width.

    Where it leads, as in (batch x length x width), what stays follows from the size of the
    dimension alone; of (width x length) and the like it does not.

    Args:
        keep: What stays.
        resized: The numbers of the other length.

    Raises:
        InputError: There is one.
    """
    if not keep.units:
        return
    coupling = keep.coupling
    for node, dims in coupling.env.items():
        there = resized.sizes.get(node)
        if not isinstance(dims, tuple) or not isinstance(there, tuple) or len(there) != len(dims):
            continue
        for term, size in zip(map(axes.resolve, dims), there, strict=True):
            if term.size != size and keep.narrows(term) and not _leads(term, coupling):
                raise _mixed(node, term.size, size)


def _leads(term: Term, coupling: Coupling) -> bool:
    """Whether all that is no width of a weight comes first, and is frozen."""
    factors = list(term.factors) if isinstance(term, Product) else []
    while factors and isinstance(factors[0], Axis) and factors[0].reason is not None:
        factors.pop(0)
    return all({*axes.leaves(f)} <= coupling.weight_axes for f in factors) and bool(factors)


def literal_there(
    resized: Resized, node: fx.Node, literal: Literal, counts: tuple[int, int]
) -> int:
    """A size literal at the other length, with the units that stay.

    Args:
        resized: The numbers of the other length.
        node: Whose argument it is.
        literal: The literal.
        counts: Its dense and its new count at the captured length.

    Raises:
        InputError: It is no multiple of a width.
    """
    dense, count = counts
    args, kwargs = resized.arguments_of(node)
    head, *rest = literal.path
    value = args[head] if isinstance(head, int) else kwargs[head]
    for step in rest:
        value = value[step]
    if value == literal.sign * dense:
        return literal.sign * count
    if count == dense:
        return int(value)
    new, left = divmod(value * count, dense)
    if left or not isinstance(axes.resolve(literal.term), Product):
        raise _mixed(node, dense, abs(value))
    return int(new)


def _mixed(node: fx.Node, here: int, there: int) -> InputError:
    return InputError(
        f"a size mixes a width that shrinks with the length of the data: {here} at the captured "
        f"length, {there} at that of a batch",
        where=where(node),
        remedy=_REMEDY,
    )
