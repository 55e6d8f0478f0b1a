"""The order of the package's folders, and the imports between them, read from the code."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "depcut"

# From the bottom up: a folder (or root module) imports from itself and from what stands before it.
# "depcut" is the package itself, i.e. depcut/__init__.py.
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
pictures
reference
synthetic
calibration scores
allocate
rewrite
verify
masking
repair
rebuild
options
apply
deploy
timing latency
frontiers
analysis dead_units shrinking api
training integrations storage streaming
depcut cli __main__
""".split()


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree, walked once."""
    return tuple(ast.walk(parsed(path)))


def module_name(path: Path) -> str:
    """Dotted name below the package; a package's __init__ is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def stage(module: str) -> str:
    """The folder (or root module) that a module belongs to."""
    return module.partition(".")[0] or "depcut"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n.partition(".")[2] in MODULES else str(node.module) for n in names}
    ours = {n.partition(".")[2] for n in found if n.partition(".")[0] == "depcut"}
    return ours - {module_name(path)}


def between_stages() -> Counter[tuple[str, str]]:
    """Pairs of modules, one importing the other, by their stages (importer, imported)."""
    pairs: Counter[tuple[str, str]] = Counter()
    for name, path in MODULES.items():
        pairs.update((stage(name), stage(o)) for o in imports(path) if stage(o) != stage(name))
    return pairs


def purpose(name: str) -> str:
    """The first sentence of a stage's docstring."""
    path = MODULES["" if name == "depcut" else name]
    text = ast.get_docstring(parsed(path)) or ""
    return text.partition("\n")[0]


def folders() -> str:
    """The table of folders and root modules for CONTRIBUTING.md."""
    rows = []
    for name in ORDER:
        path = MODULES["" if name == "depcut" else name]
        folder = path.name == "__init__.py" and name != "depcut"
        shown = f"{name}/" if folder else path.name
        rows.append(f"| `{shown}` | {purpose(name)} |")
    return "\n".join(["| folder | holds |", "| --- | --- |", *rows])
