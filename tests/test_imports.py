"""`import depcut` loads no heavy library, and what a file imports is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from layers import PACKAGE, nodes

from depcut.errors import TorchVersionError
from depcut.support import torch_floor

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Libraries that take long to import: functions that use them import them.
HEAVY = {
    "accelerate", "jinja2", "lightning", "matplotlib", "networkx", "onnx", "onnx_ir", "onnxruntime",
    "onnxscript", "openvino", "pandas", "platformdirs", "rich", "safetensors", "scipy", "sklearn",
    "sympy", "torch._dynamo", "torch._inductor", "torch.onnx", "transformers",
}  # fmt: skip
# Files whose functions import what loads the compiler, sympy or ONNX with it.
TORCH_WITHIN = {
    "fsdp_private.py", "onnx_private.py", "sharded.py", "sharding.py", "torch_private.py",
}  # fmt: skip
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}


def test_importing_depcut_loads_no_heavy_library() -> None:
    script = "import sys, torch; before = set(sys.modules); import depcut; " + (
        "print(*sorted(set(sys.modules) - before))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    )
    loaded = set(ran.stdout.split())
    assert "depcut.analysis" in loaded
    assert loaded & HEAVY == set()


def test_the_command_line_answers_without_the_runtimes() -> None:
    script = "import sys; from depcut.cli import main; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert set(ran.stdout.split()) & (HEAVY - {"rich"}) == set()


FAKED = """
import sys, torch
torch.__version__ = sys.argv[1]
import depcut
"""


def with_torch(version: str) -> subprocess.CompletedProcess[str]:
    """What importing depcut says if torch were of that version."""
    return subprocess.run(
        [sys.executable, "-c", FAKED, version],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_a_torch_that_is_too_old_is_named_at_import() -> None:
    ran = with_torch("2.8.0+cu128")
    assert ran.returncode == 1
    assert ran.stderr.endswith(
        "depcut.errors.TorchVersionError: torch 2.8.0+cu128 is installed, depcut needs 2.13 or "
        "newer\n  where: import depcut\n  to do: pip install 'torch>=2.13'\n"
    )


def test_the_check_of_torch_comes_first() -> None:
    trace = with_torch("1.13.1").stderr
    assert trace.count("depcut/__init__.py") == 1
    assert "depcut/analysis.py" not in trace


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0a0+git1a2b3c", "2.14.1", "3.0", "10.2"])
def test_a_newer_torch_is_accepted(version: str) -> None:
    assert torch_floor.check_torch(version) is None


@pytest.mark.parametrize("version", ["2.12.1", "2.9.1+cpu", "1.13.0"])
def test_an_older_torch_is_refused(version: str) -> None:
    with pytest.raises(TorchVersionError, match=re.escape(version)) as caught:
        torch_floor.check_torch(version)
    assert isinstance(caught.value, ImportError)
    assert "pip install" in str(caught.value.remedy)


def test_the_floor_is_the_declared_one() -> None:
    floor = ".".join(map(str, torch_floor.TORCH_FLOOR))
    assert f"torch>={floor}" in PROJECT["dependencies"]
    assert f"Any torch from {floor} on" in (ROOT / "README.md").read_text()


def imported(found: Iterable[ast.AST]) -> Iterator[tuple[ast.stmt, str]]:
    """Import statements among nodes with the top-level modules that they name."""
    for node in found:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, str(node.module).partition(".")[0]


def test_functions_import_heavy_libraries_and_nothing_else() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        functions = [n for n in nodes(path) if isinstance(n, ast.FunctionDef)]
        local = {id(node) for f in functions for node, _ in imported(ast.walk(f))}
        for node, module in imported(nodes(path)):
            if path.name in TORCH_WITHIN and module == "torch":
                continue
            if id(node) in local and module not in {*HEAVY, "depcut"}:
                wrong.append(f"{path.name}:{node.lineno}: {module} in a function")
    assert wrong == []


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", entry, maxsplit=1)[0].replace("-", "_") for entry in requirements}


def third_party(folder: Path) -> set[str]:
    """Distributions that the files of a folder import."""
    scripts = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    scripts += (ROOT / "docs").glob("*.py")
    ours = {path.stem for path in scripts} | {"depcut", "my_models"}  # a test writes my_models.py
    files = [*folder.rglob("*.py")]
    modules = {module for path in files for _, module in imported(nodes(path))}
    found = modules - ours - set(sys.stdlib_module_names)
    return {DISTRIBUTIONS.get(module, module).replace("-", "_") for module in found}


def test_what_the_package_imports_is_declared_and_the_other_way_round() -> None:
    extras = PROJECT["optional-dependencies"]
    needed = names(PROJECT["dependencies"])
    optional = names([*extras["train"], *extras["demo"], *extras["plot"], *extras["openvino"]])
    used = third_party(PACKAGE)
    assert used - needed - optional == set()
    assert (needed | optional) - used == set()


@pytest.mark.parametrize(
    ("folder", "extra"), [("tests", "test"), ("benchmarks", "bench"), ("examples", "test")]
)
def test_what_scripts_import_is_declared(folder: str, extra: str) -> None:
    extras = PROJECT["optional-dependencies"]
    declared = names([*PROJECT["dependencies"], *extras[extra], *extras["train"], *extras["test"]])
    # Installed without their dependencies, which no requirement can say.
    assert third_party(ROOT / folder) - declared - {"torchvision", "timm"} == set()
