"""The documentation: its code runs, and its reference names what there is."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest
import zoo
from option_table import option_table

import depcut
from depcut.ops.registry import unregister
from depcut.options import Options

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    str(p.relative_to(DOCS)): p for p in sorted(DOCS.rglob("*.md")) if BLOCK.search(p.read_text())
}
REFERENCE = "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md"))


@pytest.mark.sweep
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.libraries()
    monkeypatch.chdir(tmp_path)  # some pages write files
    script = tmp_path / "page.py"  # a file, so that classes have a source
    script.write_text("\n".join(BLOCK.findall(PAGES[page].read_text())))
    try:
        assert runpy.run_path(str(script), run_name="page")["__name__"] == "page"
    finally:
        unregister("guide.scaled")


def test_pages_have_code() -> None:
    guides = {name for name in PAGES if name.startswith("guides/")}
    assert guides == {f"guides/{p.name}" for p in (DOCS / "guides").glob("*.md")}
    assert {"index.md", "quickstart.md", "errors.md"} <= PAGES.keys()


def test_the_reference_names_what_there_is() -> None:
    pages = REFERENCE + (DOCS / "errors.md").read_text()
    named = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(named) > 30
    for name in named:
        module, _, last = name.rpartition(".")
        if not hasattr(importlib.import_module(module), last):
            importlib.import_module(name)


def test_every_public_name_has_an_entry() -> None:
    errors = (DOCS / "errors.md").read_text()
    missing = []
    for module, space in (("depcut", depcut), ("depcut.training", depcut.training)):
        for name in space.__all__:
            value = getattr(space, name)
            entry = f"::: {getattr(value, '__module__', '')}.{name}"
            error = isinstance(value, type) and issubclass(value, Exception)
            known = entry in REFERENCE or (error and name in errors)
            plain = name.startswith("__") or not callable(value)
            if not (known or plain or name in RESULTS):
                missing.append(f"{module}.{name}")
    assert missing == []


# What functions return: described where these are.
RESULTS = {"Iterated", "LotteryTicket", "OriginalSchedule", "Phase", "Retrained", "TrainingOptions"}


def test_the_table_of_options_has_every_option() -> None:
    table = option_table()
    assert [n for n in Options.__dataclass_fields__ if f"| `{n}` |" not in table] == []
