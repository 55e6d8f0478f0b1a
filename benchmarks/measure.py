"""What the benchmarks share: fair timing, torch's own count of MACs, and written results."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent / "tests"))  # the zoo and the oracle live with the tests

Result = TypeVar("Result")
Row = dict[str, Any]
CLOCK = time.perf_counter


@contextmanager
def without_collection() -> Iterator[None]:
    """Garbage collection off, and what is alive set aside, for the time of the context."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of one call without garbage collection, and its result."""
    with without_collection():
        start = CLOCK()
        result = function()
        return CLOCK() - start, result


def interleaved(candidates: Sequence[Callable[[], float]], repeat: int) -> list[list[float]]:
    """Samples of each candidate (which returns its own seconds), taken in turns."""
    rounds = [[candidate() for candidate in candidates] for _ in range(repeat)]
    return [list(samples) for samples in zip(*rounds, strict=True)]


def median_of(function: Callable[[], Any], repeat: int, warm: int = 1) -> float:
    """Median seconds of several calls after some that do not count."""
    for _ in range(warm):
        function()
    return median(timed(function)[0] for _ in range(repeat))


def geometric_mean(values: Iterable[float]) -> float:
    """NaN where there are none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]


def shapes(model: nn.Module, inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in outputs(model, inputs)]


def counted_macs(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Multiply-accumulates by operator as torch's FlopCounterMode counts them.

    Attention and recurrent layers run as plain matrix products for it, since the counter knows no
    fused CPU kernel.
    """
    counter = FlopCounterMode(display=False)
    with plain_attention(), plain_recurrence(), without_gradients(model), torch.no_grad(), counter:
        call(model, inputs)
    return {str(op): flops / 2 for op, flops in counter.get_flop_counts()["Global"].items()}


@contextmanager
def plain_attention() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def plain_recurrence() -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """The counter's hooks fail on parameters that are passed to a module as arguments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def machine() -> Row:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(name: str, rows: Sequence[Row], summary: Mapping[str, Any]) -> list[Path]:
    """Rows, summary and machine as one compact JSON file, benchmarks/results/NAME.json.

    A row is a line, the values in the order of "columns", null where the row has no such column.
    Numbers have six digits. A string of a column under "texts" is its position there.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    _replace(path, encoded({"machine": machine(), "summary": dict(summary), "rows": list(rows)}))
    return [path]


def read(name: str) -> Row:
    """Machine, summary and rows that were written under a name; without a file there are none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {"machine": {}, "summary": {}, "rows": []}
    data = json.loads(path.read_text())
    columns, texts = data.pop("columns"), data.pop("texts")
    lines = [list(zip(columns, line, strict=True)) for line in data["rows"]]
    rows = [
        {k: texts[k][v] if k in texts else v for k, v in line if v is not None} for line in lines
    ]
    return {**data, "rows": rows}


def encoded(data: Row) -> str:
    """The text of a results file; `read` is its inverse, up to rounding and empty values."""
    rows = data["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts: dict[str, list[str]] = {}
    for column in columns:
        values = [row[column] for row in rows if row.get(column) is not None]
        distinct = list(dict.fromkeys(v for v in values if isinstance(v, str)))
        if all(isinstance(v, str) for v in values) and 2 * len(distinct) < len(values):
            texts[column] = distinct
    position = {column: {t: i for i, t in enumerate(every)} for column, every in texts.items()}

    def value(row: Row, column: str) -> Any:
        found = row.get(column)
        known = position.get(column)
        return found if known is None or found is None else known[found]

    head = {k: _compact(v) for k, v in data.items() if k != "rows"}
    parts = [f'"{k}":{v}' for k, v in (head | {"columns": _compact(columns)}).items()]
    parts.append(f'"texts":{_compact(texts)}')
    lines = ",\n".join(_compact([value(row, column) for column in columns]) for row in rows)
    return "{" + ",\n".join(parts) + ',\n"rows":[\n' + lines + "\n]}\n"


def _compact(value: Any) -> str:
    return json.dumps(_rounded(value), separators=(",", ":"), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else value
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def _replace(path: Path, text: str) -> None:
    """Written beside it first: a run that is interrupted leaves the earlier results whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def table(title: str, columns: Mapping[str, Callable[[Row], str]], rows: Iterable[Row]) -> Table:
    """One column per entry, its text made from the row; a row with an error shows that instead."""
    made = Table(title=title)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        if "error" in row:
            made.add_row(row["name"], "FAIL")
            continue
        made.add_row(*(show(row) for show in columns.values()))
    return made


def console() -> Console:
    """Wide enough for the tables where the output is a file."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=200, highlight=False)
