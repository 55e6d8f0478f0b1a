"""What one run of an ONNX file spends its time on: onnxruntime's own profile, by kernels."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from depcut.deploy.runtime import open_session, session_feeds
from depcut.errors import LatencyError
from depcut.timing.kernels import PROFILED, WARM, Kernel, Shape, runs_to_fill


def profile(
    path: Path, values: Mapping[str, Any], threads: int, seconds: float = PROFILED
) -> tuple[Kernel, ...]:
    """Time every kernel of a model in place: with its layout, its fusions and its neighbours.

    Args:
        path: The ONNX file.
        values: Arguments of the model by name.
        threads: Threads that one operator may use.
        seconds: Time to fill with runs.

    Returns:
        The kernels in the order in which they run.

    Raises:
        LatencyError: The runtime wrote no profile, or its kernels change from run to run.
        ExportError: The runtime does not load the file.
    """
    with tempfile.TemporaryDirectory(prefix="depcut-") as folder:
        session = open_session(path, threads, profile=Path(folder) / "profile")
        feeds = session_feeds(session, values)
        runs = runs_to_fill(seconds, lambda: session.run(None, feeds))
        for _ in range(runs + WARM - 1):
            session.run(None, feeds)
        written = Path(session.end_profiling())
        try:
            events = json.loads(written.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LatencyError(
                f"the runtime's profile cannot be read: {error}",
                where=path.name,
                remedy="free some space in the folder for temporary files, then try again",
            ) from error
    return kernels_of(events, runs + WARM, where=path.name)


def kernels_of(events: Iterable[Mapping[str, Any]], runs: int, where: str) -> tuple[Kernel, ...]:
    """The kernels of one run from the events of several.

    Args:
        events: What the runtime's profile holds.
        runs: Number of runs; the first ones only warm up.
        where: What was profiled, for messages.

    Returns:
        The kernels, each with its median time.

    Raises:
        LatencyError: The runs are not made of the same kernels.
    """
    timed = [
        event
        for event in events
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time")
    ]
    count, rest = divmod(len(timed), runs)
    rounds = [timed[i * count : (i + 1) * count] for i in range(runs)]
    names = [[event["name"] for event in one] for one in rounds]
    if not count or rest or any(one != names[0] for one in names[1:]):
        raise LatencyError(
            "the runtime's profile does not show the same kernels in every run",
            where=where,
            remedy="a graph with loops or branches cannot be modelled; shrink by of='macs' instead",
        )
    return tuple(_kernel(times) for times in zip(*rounds[WARM:], strict=True))


def _kernel(events: Sequence[Mapping[str, Any]]) -> Kernel:
    details = events[0]["args"]
    blocked = "_nchwc_" in events[0]["name"]
    return Kernel(
        op=details["op_name"] + (" (blocked)" if blocked else ""),
        inputs=_shapes(details.get("input_type_shape", ())),
        outputs=_shapes(details.get("output_type_shape", ())),
        seconds=median(float(event["dur"]) for event in events) * 1e-6,
    )


def _shapes(entries: Iterable[Mapping[str, Sequence[int]]]) -> tuple[Shape, ...]:
    """Shapes of the entries that hold real numbers."""
    return tuple(
        tuple(int(size) for size in shape)
        for entry in entries
        for kind, shape in entry.items()
        if "float" in kind or "double" in kind
    )
