"""The outputs that do not count, and become narrower."""

from __future__ import annotations

from torch import fx

from depcut.plan.keep import Keep


def narrower(keep: Keep) -> tuple[str, ...]:
    """Notes on the outputs that do not count and are narrower than the dense model's.

    Args:
        keep: What stays.
    """
    found: dict[str, None] = {}
    for program in keep.coupling.program.examples:
        results = program.results
        for path, counts, node in zip(results.paths, results.counts, program.outputs, strict=False):
            dims = keep.coupling.env.get(node) if isinstance(node, fx.Node) else None
            if counts or not isinstance(dims, tuple) or not any(map(keep.narrows, dims)):
                continue
            sizes = ", ".join(
                f"{t.size} to {keep.count(t)}" for t in dims if keep.count(t) != t.size
            )
            found[f"the output {path!r} does not count, and is narrower: {sizes}"] = None
    return tuple(found)
