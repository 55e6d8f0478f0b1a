"""What a plan keeps of how its class is built anew, as JSON, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from depcut.errors import listed
from depcut.plan.stacks import LAYERS, REBUILD, Stack, stacks_of
from depcut.rebuild.recipe import Number, Path, Values


def record(
    base: Values,
    values: Values,
    held: Iterable[tuple[str, str]],
    stacks: Iterable[Stack] = (),
) -> dict[str, Any]:
    """What a plan keeps.

    Args:
        base: The dense numbers.
        values: Those to build the smaller class with.
        held: Groups that are kept whole, each with the reason.
        stacks: Lists of layers that get shorter.
    """
    fields = [[list(path), base[path], value] for path, value in values.items()]
    layers = [stack.record() for stack in stacks]
    return {"fields": fields, "held": dict(held)} | ({LAYERS: layers} if layers else {})


def values_of(settings: Mapping[str, Any]) -> dict[Path, Number]:
    """The numbers that a plan's settings say to build the class with; {}: they say nothing.

    Args:
        settings: Of the plan.
    """
    return {tuple(path): now for path, _, now in settings.get(REBUILD, {}).get("fields", ())}


def lines(settings: Mapping[str, Any]) -> list[str]:
    """The record in words, for a report.

    Args:
        settings: Of a plan.
    """
    kept: Mapping[str, Any] = settings.get(REBUILD, {})
    if "off" in kept:
        return [f"not rebuildable from a config: {kept['off']}"]
    if not kept:
        return []
    changes = [stack.line for stack in stacks_of(settings)]
    changes += [_changed(*f) for f in kept["fields"]]
    out = [f"rebuilt from its config: {listed(changes, 99)}"]
    if "whole_layers" in kept:
        out.append(f"no whole layer goes: {kept['whole_layers']}")
    reasons: dict[str, list[str]] = {}
    for name, why in kept["held"].items():
        reasons.setdefault(why, []).append(name)
    out += [f"kept whole: {listed(names, 3)}: {why}" for why, names in reasons.items()]
    if kept.get("loss") is not None:
        free = kept.get("free_loss")
        beside = "" if free is None else f"; cut freely, {free:.2%} would go"
        beside += "; layers that go are not counted" if stacks_of(settings) else ""
        out.append(f"predicted loss: {kept['loss']:.2%} of the score goes{beside}")
    return out


def _changed(path: Sequence[Any], dense: Number, now: Number) -> str:
    name = ".".join(map(str, path))
    return f"{name} {dense:g} -> {now:g}" if dense != now else f"{name} {now:g}, said now"
