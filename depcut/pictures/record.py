"""An analysed architecture as plain data: what a page shows, and what JSON takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
from torch import nn

from depcut.branches.branch import Branch
from depcut.coupling.groups import Coupling, Frozen, Group, layer_of
from depcut.plan import cost
from depcut.plan.keep import Keep
from depcut.plan.layers import LayerSizes, layer_sizes

Record = dict[str, Any]
_COSTS = ("macs", "params")


def plain(value: Any) -> Any:
    """A result as what JSON takes: dicts, lists, numbers and texts.

    Args:
        value: Dataclasses, mappings and sequences of plain values; what is no finite number
            becomes None, and what JSON has no word for its text.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def group_record(group: Group) -> Record:
    """A group as plain data.

    Args:
        group: One group.
    """
    readers = dict.fromkeys(layer_of(m.tensor) for m in group.members if m.role == "consumer")
    return {
        "group": group.name,
        "units": group.size,
        "rows": group.rows,
        "tie": group.tied,
        "narrows": list(group.layers),
        "read_by": list(readers),
        "members": [[m.tensor, m.dim, m.role] for m in group.members],
    }


def frozen_record(frozen: Frozen) -> Record:
    """A frozen dimension as plain data.

    Args:
        frozen: One of them.
    """
    return {
        "tensor": frozen.tensor,
        "dim": frozen.dim,
        "size": frozen.size,
        "reason": frozen.reason,
        "where": frozen.where,
    }


def analysis_record(coupling: Coupling, model: nn.Module, branches: Iterable[Branch]) -> Record:
    """Groups, frozen dimensions, costs and what inference had to say, as plain data.

    Args:
        coupling: The analysed architecture.
        model: The model it was analysed from.
        branches: Its residual branches.
    """
    program = coupling.program
    totals = {n: round(cost.dense_total(cost.ITEMS[n](coupling, cost.NOTHING))) for n in _COSTS}
    return {
        "model": type(model).__name__,
        **totals,
        "frozen_share": coupling.frozen_share,
        "groups": [group_record(g) for g in coupling.groups],
        "frozen": [frozen_record(f) for f in coupling.frozen],
        "branches": [{"name": b.name, "macs": round(b.macs)} for b in branches],
        "unknown": {op: list(nodes) for op, nodes in coupling.unknown.items()},
        "unused": sorted(program.unused),
        "calls": len(program.examples),
        "notes": list(program.notes),
    }


def layer_record(layer: LayerSizes) -> Record:
    """The sizes of a layer as plain data.

    Args:
        layer: One layer.
    """
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "shape": list(layer.shape[0]),
        "shape_now": list(layer.shape[1]),
        "params": layer.params[0],
        "params_now": layer.params[1],
        "macs": layer.macs[0],
        "macs_now": layer.macs[1],
    }


def layer_of_record(record: Mapping[str, Any]) -> LayerSizes:
    """The sizes of a layer from what `layer_record` made of them.

    Args:
        record: Plain data.
    """
    return LayerSizes(
        record["layer"],
        record["kind"],
        (tuple(record["shape"]), tuple(record["shape_now"])),
        (record["params"], record["params_now"]),
        (record["macs"], record["macs_now"]),
    )


def layer_records(keep: Keep, model: nn.Module) -> list[Record]:
    """The sizes of all layers as plain data.

    Args:
        keep: What stays.
        model: The dense model.
    """
    return [layer_record(layer) for layer in layer_sizes(keep, model)]
