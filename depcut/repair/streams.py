"""The stream of a residual network that the result of a layer is added to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from depcut.graph.operators import base_name, is_aten
from depcut.ops.contraction import MatrixProduct
from depcut.ops.site import Site


def stream(site: Site, sizes: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The node that the result of a linear layer is added to, if it was computed before.

    Args:
        site: The site.
        sizes: Of every node.
    """
    if not isinstance(site.family, MatrixProduct) or site.family.features != -1:
        return None
    node = site.node
    while len(node.users) == 1:
        (user,) = node.users
        if "dropout" in base_name(user):
            node = user
            continue
        others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
        plain = len(user.args) == 2 and not user.kwargs
        if is_aten(user, "add") and plain and len(others) == 1:
            alike = others[0].op == "call_function" and sizes[others[0]] == sizes[site.node]
            return others[0] if alike and others[0] < site.node else None
        return None
    return None
