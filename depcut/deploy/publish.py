"""Move a finished ONNX file and its weights to their place, so that both always match."""

from __future__ import annotations

import re
from pathlib import Path

from depcut.support.files import move


def publish(draft: Path, target: Path) -> int:
    """Move a finished graph, and the weights beside it, to its place.

    The weights go first, under a name that no other graph refers to. Whenever this stops, `target`
    and what it refers to belong together: both are the old ones or both are the new ones.

    Args:
        draft: The graph, in a folder with nothing but its weights, on the file system of `target`.
        target: Where it belongs, see `depcut.support.files.target_of`.

    Returns:
        The bytes that it takes, weights included.
    """
    stale = _weights_of(target)
    weights = [file for file in draft.parent.iterdir() if file != draft]
    size = sum(file.stat().st_size for file in (draft, *weights))
    for file in weights:
        move(file, target.parent / file.name)
    move(draft, target)
    for file in stale - {target.parent / file.name for file in weights}:
        file.unlink(missing_ok=True)
    return size


def _weights_of(graph: Path) -> set[Path]:
    """Files that an existing graph refers to and that are named after it: no other one's."""
    import onnx

    try:
        proto = onnx.load(str(graph), load_external_data=False)
    except Exception:  # noqa: BLE001  (whatever the old file is, it is about to be replaced)
        return set()
    named = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    own = re.compile(re.escape(graph.name) + r"(\.[0-9a-f]{8})?\.data")
    return {graph.parent / name for name in named if own.fullmatch(name)}
