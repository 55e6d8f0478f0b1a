"""The package's shape: imports go one way, files stay short, the surface is the documented one."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

import depcut

PACKAGE = Path(depcut.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ROOT = ""  # the package itself, i.e. depcut/__init__.py

# From the bottom up: a folder (or root module) imports from itself and from what stands before it.
ORDER = """
errors version
support
axes
capture
graph
ops
coupling
branches
plan
reference
calibration scores
allocate
rewrite
verify
repair
options
apply
deploy
timing latency
analysis dead_units api
training integrations
depcut cli __main__
""".split()
LEVEL = {name: i for i, name in enumerate(ORDER)}

PUBLIC = """
Analysis BudgetError Calibration CaptureError DepcutError ExportError InputError LatencyError Op
Options Plan PlanError RuleError Score TrainingError VerificationError __version__ analyze bench
compact compaction compare export integrations report rule shrink training
""".split()


def module_name(path: Path) -> str:
    """Dotted name below the package; a package's __init__ is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n.partition(".")[2] in MODULES else str(node.module) for n in names}
    ours = {n.partition(".")[2] for n in found if n.partition(".")[0] == "depcut"}
    return ours - {module_name(path)}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def stage(module: str) -> str:
    """The folder (or root module) that a module belongs to."""
    return module.partition(".")[0] or "depcut"


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
        (depcut.integrations, ["lightning_callback", "transformers_callback"]),
    ],
)
def test_the_public_surface_is_what_is_documented(package: Any, names: list[str]) -> None:
    assert sorted(package.__all__) == dir(package) == sorted(names)
    for name in names:
        assert getattr(package, name).__doc__, f"{name} says nothing about itself"


def test_the_root_exports_at_most_thirty_names() -> None:
    assert len(dir(depcut)) <= 30


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_use_only_the_public_surface(document: str) -> None:
    text = (PACKAGE.parent / document).read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    used = set(re.findall(r"\bdepcut\.([A-Za-z_][\w.]*)", code))
    used |= set(re.findall(r"(?<![\w.])((?:training|integrations)\.[a-zA-Z_]\w*)", code))
    assert used
    for name in used:
        value: Any = depcut
        for part in name.split("."):
            assert part in dir(value), name
            value = getattr(value, part)
