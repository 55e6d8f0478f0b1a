"""All sites of a captured model, by the families of operators that have a way to extract them."""

from __future__ import annotations

from collections.abc import Callable

from depcut.calibration import cells, patches, products
from depcut.calibration.site import Place, Site
from depcut.coupling import Coupling

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
            found += build(Place(coupling, node))
    return found


def takes_shift(site: Site) -> bool:
    """Whether a constant can be added to its results: a bias, or a batch norm that alone reads it.

    Args:
        site: Any site.
    """
    norms = ["aten.batch_norm" in str(user.target) for user in site.node.users]
    return bool(site.biases) or (bool(norms) and all(norms))
