"""All sites of a captured model, by the families of operators that have a way to extract them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from depcut import axes
from depcut.calibration import cells, patches, products
from depcut.calibration.site import Place, Site
from depcut.capture.program import Program
from depcut.coupling.groups import Coupling

_FAMILIES: dict[str, Callable[[Place], list[Site]]] = {
    "aten.linear": products.linear,
    **dict.fromkeys(
        [f"aten.{n}" for n in ("matmul", "mm", "bmm", "addmm", "addmm_", "baddbmm")],
        products.matmul,
    ),
    "aten.einsum": products.einsum,
    **{f"aten.conv{rank}d": patches.conv for rank in (1, 2, 3)},
    **{f"aten.conv_transpose{rank}d": patches.conv_transpose for rank in (1, 2, 3)},
    **{f"aten.{kind}": cells.recurrent for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}


def find_sites(coupling: Coupling) -> list[Site]:
    """All sites, in the order of execution.

    Where a weight is computed (standardised, normalised) rather than read, there is none.

    Args:
        coupling: The analysed model.
    """
    found: list[Site] = []
    for node in coupling.program.graph.graph.nodes:
        effects = coupling.effects.get(node)
        if effects is None or not effects.contracts:
            continue
        name = str(node.target)
        build = _FAMILIES.get(name) or _FAMILIES.get(name.rpartition(".")[0])
        if build is not None:
            place = Place(coupling, node)
            found += [replace(s, absorbed=_absorbed(s, place)) for s in build(place)]
    return found


def _absorbed(site: Site, place: Place) -> bool:
    """Whether batch norms over the site's own outputs are all that reads it."""
    rows = list(axes.leaves(axes.resolve(site.rows)))
    return bool(site.node.users) and all(
        is_batch_norm(user)
        and shared_statistics(user, place.coupling) is None
        and list(axes.leaves(place.dims(site.node)[1])) == rows
        for user in site.node.users
    )


def is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm of any rank."""
    return str(node.target) == "aten.batch_norm.default"


def shared_statistics(norm: fx.Node, coupling: Coupling) -> str | None:
    """A running statistic of a batch norm that something else reads too, None if there is none.

    Args:
        norm: A batch norm.
        coupling: The analysed model.
    """
    program = coupling.program
    for source in norm.args[3:5]:
        name = program.tensors.get(source) if isinstance(source, fx.Node) else None
        if name is not None and is_shared(name, coupling):
            return name
    return None


def is_shared(name: str, coupling: Coupling) -> bool:
    """Whether a parameter or buffer is read in several places of the graph.

    Args:
        name: Its name.
        coupling: The analysed model.
    """
    return coupling.program.reads(name) > 1


def parameters_behind(node: fx.Node, program: Program) -> tuple[str, ...]:
    """Parameters that a node is computed from, if it is computed from nothing else.

    Args:
        node: A node of the captured graph.
        program: The captured model.
    """
    return program.computed_from.get(node, ())
