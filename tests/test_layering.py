"""The package's shape: imports go one way, files stay short, the surface is the documented one."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import networkx as nx
import pytest

import depcut

PACKAGE = Path(depcut.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ROOT = ""  # the package itself, i.e. depcut/__init__.py

# From the bottom up: a module imports only from lines above its own, never from its own line.
ORDER = [
    "errors axes tables inline program provenance demo_net version machine origin",
    "checks inputs loading liveness",
    "capture",
    "ops.registry",
    "ops.pointwise ops.contraction ops.convolution ops.normalization ops.reduction ops.shape "
    "ops.join ops.attention ops.indexing ops.recurrent",
    "ops outer mesh",
    "coupling",
    "cost keep taint units",
    "taint_rules calibration rewrite rewrite.literals rewrite.copying rewrite.generated "
    "rewrite.dropout",
    "rewrite.tensors",
    "reference",
    "calibration.data",
    "calibration.progress calibration.site calibration.moments",
    "calibration.solve calibration.lockstep",
    "calibration.gradients calibration.visits calibration.patches calibration.products "
    "calibration.cells calibration.sensitivity",
    "calibration.sites calibration.readings",
    "scores.context scores.slices scores.flow scores.maps scores.rows scores.elimination",
    "scores.aggregate",
    "scores.magnitude scores.geometry scores.gradient scores.synaptic",
    "scores.scale scores.activation scores.reconstruction",
    "scores allocate allocate.space",
    "allocate.order allocate.lagrange",
    "rewrite.graph",
    "rewrite.removal",
    "rewrite.module rewrite.optimizer rewrite.preferences",
    "rewrite.build rewrite.masks",
    "depth depth.branches",
    "depth.find",
    "observe constants",
    "readings",
    "dead folding",
    "verify compensate architecture",
    "mend",
    "plan",
    "training training.schedules training.streams training.distance training.fresh",
    "training.batches training.optimizers training.snapshots training.distillation "
    "training.checkpoint",
    "training.trainer training.outputs",
    "training.rates",
    "training.loop",
    "runtime",
    "agreement convert publish",
    "export",
    "timing.clock timing timing.pinning timing.footprint",
    "timing.backends timing.memory",
    "timing.sessions timing.modules",
    "timing.bench",
    "choose depth.score latency latency.kernels latency.designs",
    "depth.choose",
    "latency.samples latency.sizes",
    "latency.align latency.cache latency.measure",
    "latency.staircase",
    "latency.model",
    "latency.target",
    "analysis",
    "api compact",
    "training.places training.folders",
    "training.probe training.compose training.sparsity",
    "training.masks training.iterative",
    "training.gradual training.budget",
    "training.callbacks",
    "report",
    ROOT,
    "demo options",
    "cli",
]
LEVEL = {name: i for i, line in enumerate(ORDER) for name in line.split(" ")}

PUBLIC = """
Analysis BudgetError Calibration CaptureError Compaction Comparison Compensation DepcutError
Distillation ExportError ExportReport Frozen Gradual Group GroupLasso GrowingRegularization
InputError Iterated LatencyError LatencyModel LotteryTicket Member Op OriginalSchedule Phase Plan
PlanError Retrained RuleError Score Snapshots TrainingError VerificationError analyze bench
budget_phases compact compaction compare export fresh iterate lightning_callback lottery_ticket
output_distance relative_distance retrain rewind rule run_phases schedule scratch_epochs shrink
transformers_callback __version__
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


def test_every_module_has_its_place_in_the_order() -> None:
    assert set(MODULES) - set(LEVEL) == set()
    assert set(LEVEL) - set(MODULES) == set()


def test_imports_have_no_cycle() -> None:
    graph = nx.DiGraph([(name, other) for name, others in GRAPH.items() for other in others])
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_those_above_it(name: str) -> None:
    wrong = {other for other in GRAPH[name] if LEVEL[other] >= LEVEL.get(name, 0)}
    assert wrong == set()


def test_the_algebra_knows_no_torch() -> None:
    roots = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(MODULES["axes"].read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert roots <= {*sys.stdlib_module_names, "numpy"}


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_longer_than_400_lines(name: str) -> None:
    length = len(MODULES[name].read_text().splitlines())
    assert length <= 400


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
