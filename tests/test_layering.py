"""The package's shape: imports go one way, files stay short, the surface is the documented one."""

from __future__ import annotations

import ast
import re
import sys

import draw_imports
import networkx as nx
import pytest
from layers import MODULES, ORDER, PACKAGE, between_stages, folders, imports, stage

import depcut

LEVEL = {name: i for i, name in enumerate(ORDER)}

PUBLIC = """
Analysis BudgetError Calibration CaptureError Compaction Comparison Compensation DepcutError
Distillation ExportError ExportReport Frozen Gradual Group GroupLasso GrowingRegularization
InputError Iterated LatencyError LatencyModel LotteryTicket Member Op OriginalSchedule Phase Plan
PlanError Retrained RuleError Score Snapshots TrainingError VerificationError analyze bench
budget_phases compact compaction compare export fresh iterate lightning_callback lottery_ticket
output_distance relative_distance retrain rewind rule run_phases schedule scratch_epochs shrink
transformers_callback __version__
""".split()


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {stage(name) for name in MODULES} == set(ORDER)


def test_imports_have_no_cycle() -> None:
    graph = nx.DiGraph([(name, other) for name, others in GRAPH.items() for other in others])
    assert list(nx.simple_cycles(graph)) == []


def test_a_folder_imports_only_from_those_above_it() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if LEVEL[stage(other)] > LEVEL[stage(name)]
    ]
    assert wrong == []


def test_the_picture_and_the_table_of_folders_are_up_to_date() -> None:
    redraw = "run python docs/draw_imports.py"
    assert draw_imports.drawn(draw_imports.PICTURE.read_text()) == set(between_stages()), redraw
    assert folders() in draw_imports.CONTRIBUTING.read_text(), redraw


def test_the_root_is_no_drawer() -> None:
    modules = [p.name for p in PACKAGE.glob("*.py")]
    assert len(modules) <= 8


def test_the_algebra_knows_no_torch() -> None:
    roots = {
        name.partition(".")[0]
        for module, path in MODULES.items()
        if stage(module) == "axes"
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert roots <= {*sys.stdlib_module_names, "numpy", "depcut"}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_the_public_surface_is_what_is_documented() -> None:
    assert sorted(depcut.__all__) == sorted(PUBLIC)
    for name in depcut.__all__:
        assert getattr(depcut, name).__doc__, f"{name} says nothing about itself"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_use_only_the_public_surface(document: str) -> None:
    text = (PACKAGE.parent / document).read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    used = set(re.findall(r"\bdepcut\.([A-Za-z_]\w*)", code))
    assert used <= {*PUBLIC, *(name.partition(".")[0] for name in MODULES)}
    calls = set(re.findall(r"\bdepcut\.([A-Za-z_]\w*)\(", code))
    assert calls <= set(PUBLIC)
