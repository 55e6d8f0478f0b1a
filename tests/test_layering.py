"""The package's shape: imports go one way, files stay short, the surface is the documented one."""

from __future__ import annotations

import ast
import pkgutil
import re
import sys
from typing import Any

import draw_imports
import networkx as nx
import pytest
from layers import MODULES, ORDER, PACKAGE, between_stages, folders, imports, nodes, stage

import depcut

LEVEL = {name: i for i, name in enumerate(ORDER)}

PUBLIC = """
Analysis BudgetError Calibration CaptureError DepcutError ExportError InputError LatencyError Op
Options Plan PlanError RuleError Score TrainingError VerificationError __version__ analyze bench
compact compaction compare export integrations load report rule save shrink shrink_checkpoint
training
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
        for node in nodes(path)
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


TRAINING = """
Distillation Gradual GroupLasso GrowingRegularization Iterated LotteryTicket OriginalSchedule Phase
Retrained Snapshots TrainingOptions budget_phases fresh iterate lottery_ticket output_distance
relative_distance retrain rewind run_phases schedule scratch_epochs
""".split()


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (depcut, PUBLIC),
        (depcut.training, TRAINING),
        (
            depcut.integrations,
            ["DecodingStep", "decoding_step", "lightning_callback", "transformers_callback"],
        ),
    ],
)
def test_the_public_surface_is_what_is_documented(package: Any, names: list[str]) -> None:
    assert sorted(package.__all__) == dir(package) == sorted(names)
    for name in names:
        assert getattr(package, name).__doc__, f"{name} says nothing about itself"


def test_the_root_exports_at_most_thirty_one_names() -> None:
    # Thirty, and shrink_checkpoint: what it does to a folder no keyword of shrink would say.
    assert len(dir(depcut)) <= 31


def names_in(document: str) -> set[str]:
    """Names of depcut in the Python code of a document."""
    text = (PACKAGE.parent / document).read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    used = set(re.findall(r"\bdepcut\.([A-Za-z_][\w.]*)", code))
    return used | set(re.findall(r"(?<![\w.])((?:training|integrations)\.[a-zA-Z_]\w*)", code))


def test_the_readme_uses_only_the_public_surface() -> None:
    used = names_in("README.md")
    assert used
    for name in used:
        value: Any = depcut
        for part in name.split("."):
            assert part in dir(value), name
            value = getattr(value, part)


def test_names_in_the_recipes_exist() -> None:
    used = names_in("CONTRIBUTING.md")
    assert used
    for name in used:
        assert pkgutil.resolve_name(f"depcut.{name}")
