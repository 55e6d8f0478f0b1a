"""How far rounding may take a value: by the precisions that it is computed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from depcut.capture.program import Program

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of a run in double precision. Where the code itself rounds to half precision, one rounding more
# or less remains.
DOUBLE = 1e-6
_ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def coarsest(program: Program) -> Mapping[fx.Node, torch.dtype]:
    """The coarsest precision among each node's own and those of all that it is computed from.

    Args:
        program: The captured graph; integers on the way pass on what they are computed from.
    """
    out: dict[fx.Node, torch.dtype] = {}
    for node in program.graph.graph.nodes:
        found = [out[source] for source in node.all_input_nodes if source in out]
        found += [v.dtype for v in _tensors(node.meta.get("val")) if v.dtype in TOLERANCE]
        if found:
            out[node] = max(found, key=TOLERANCE.__getitem__)
    return out


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def tolerance(dtype: torch.dtype | None, *, double: bool = False) -> float:
    """The relative difference that rounding may cause.

    Args:
        dtype: The coarsest precision on the way; None: unknown.
        double: Whether the model runs in double precision, so that what is left of this one is
            what its code casts to.
    """
    dtype = torch.float32 if dtype is None else dtype
    if double:
        return _ROUNDED.get(dtype, DOUBLE)
    return TOLERANCE[dtype]


def is_half(dtype: torch.dtype) -> bool:
    """Whether a precision is coarser than single."""
    return dtype in _ROUNDED
