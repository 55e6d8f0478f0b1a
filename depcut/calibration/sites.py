"""All sites of a captured model, as the families of operators find them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from depcut import axes
from depcut.calibration.padding import without_padding
from depcut.coupling.groups import Coupling
from depcut.graph.arguments import Call, bound
from depcut.graph.liveness import storages, written_roots
from depcut.ops.contraction import MatrixProduct
from depcut.ops.normalization import is_batch_norm, shared_statistics
from depcut.ops.site import SITES, ContractionOp, Site


def find_sites(coupling: Coupling) -> list[Site]:
    """All sites, in the order of execution.

    Where a weight is computed (standardised, normalised) rather than read, there is none.

    Args:
        coupling: The analysed model.
    """
    sites: list[Site] = []
    program = coupling.program
    for node in program.graph.graph.nodes:
        effects = coupling.effects.get(node)
        find = SITES.find(node.target) if effects is not None and effects.contracts else None
        if find is not None:
            op = ContractionOp(node, coupling.env, program, coupling.dims)
            sites += [replace(s, absorbed=_absorbed(s, op)) for s in find(op)]
    return sites


def site_inputs(site: Site, call: Call, valid: torch.Tensor | None) -> torch.Tensor:
    """What a site's weight multiplies: (blocks, vectors, in), without padding.

    Args:
        site: The site.
        call: Values of its node's arguments.
        valid: Flags (examples, length) of the positions that are no padding; None: all.
    """
    x = site.family.inputs(call)
    if isinstance(site.family, MatrixProduct) and site.family.features == -1:
        (x,) = without_padding(valid, call[site.family.source], x)
    return x


def with_same_inputs(coupling: Coupling, sites: list[Site]) -> dict[Site, Site]:
    """Sites that multiply the vectors that an earlier one does, as keys do those of queries.

    Args:
        coupling: The analysed model.
        sites: In the order of execution.

    Returns:
        The first site of the same inputs, by those after it.
    """
    nodes = coupling.program.graph.graph.nodes
    roots, writes = storages(nodes), written_roots(nodes)
    changed = {root for found in writes.values() for root in found}
    first: dict[tuple[fx.Node, int], Site] = {}
    out = {}
    for site in sites:
        family = site.family
        if not isinstance(family, MatrixProduct):
            continue
        source = bound(site.node, site.node.args, site.node.kwargs)[family.source]
        if isinstance(source, fx.Node) and roots[source] not in changed:
            leader = first.setdefault((source, family.features), site)
            if leader is not site:
                out[site] = leader
    return out


def _absorbed(site: Site, op: ContractionOp) -> bool:
    """Whether batch norms over the site's own outputs are all that reads it."""
    rows = list(axes.leaves(axes.resolve(site.rows)))
    return bool(site.node.users) and all(
        is_batch_norm(user)
        and shared_statistics(user, op.program) is None
        and list(axes.leaves(op.dims(site.node)[1])) == rows
        for user in site.node.users
    )
