"""The results of the benchmarks stay small, and are read back as they were written."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def measure(tmp_path: Path) -> Any:
    """The shared module of the benchmarks, which writes to an empty folder."""
    spec = spec_from_file_location("measure", BENCHMARKS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RESULTS = tmp_path
    return module


def test_rows_come_back(measure: Any) -> None:
    rows = [
        {"name": "a", "seed": 0, "lost": 0.123456, "kept": {"x": [1, 2.5]}, "key": "k0"},
        {"name": "a", "seed": 1, "lost": -3.0, "key": "k1", "other": "nämlich"},
        {"name": "a", "seed": 2, "error": "RuntimeError: shape '[1, 2]'", "key": "k2"},
    ]
    summary = {"a: lost": "0.12", "worst": [1.5, 2]}
    (path,) = measure.write("some", rows, summary)
    found = measure.read("some")
    assert found["rows"] == rows
    assert found["summary"] == summary
    assert found["machine"] == measure.machine()
    assert measure.encoded(found) == path.read_text()
    assert measure.read("none")["rows"] == []


def test_numbers_have_six_digits(measure: Any) -> None:
    measure.write("some", [{"ms": 115.80528299964499, "macs": 714188480}], {})
    assert measure.read("some")["rows"] == [{"ms": 115.805, "macs": 714188480}]


def test_results_and_their_text_stay_small() -> None:
    sizes = {f.name: f.stat().st_size for f in (BENCHMARKS / "results").iterdir()}
    assert sizes.pop("study.jsonl.gz") < 400_000  # ten thousand rows and more
    assert sum(sizes.values()) < 600_000
    assert len((BENCHMARKS / "README.md").read_text().split()) < 4000
