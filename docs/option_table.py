"""A hook of MkDocs that puts the table of options, as the code documents them, into its page."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from depcut.options import Options
from depcut.support.keywords import doc_of

_MARK = "<!-- options -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page, with the table where its mark stands."""
    return markdown.replace(_MARK, option_table()) if _MARK in markdown else markdown


def option_table() -> str:
    """Name, default and meaning of every option."""
    rows = [
        f"| `{f.name}` | `{f.default!r}` | {doc_of(Options, f.name)} |" for f in fields(Options)
    ]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])
