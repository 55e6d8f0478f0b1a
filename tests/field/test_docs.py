"""The table of situations names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "field.md"


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| situation", "| ---"))]
    assert len(rows) > 40
    for row in rows:
        [(file, name)] = re.findall(r"`(test_\w+\.py)::(test_\w+)` \|$", row)
        tree = ast.parse((HERE / file).read_text())
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, row
