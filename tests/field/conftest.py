"""What several test modules of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored_models import heads

import depcut


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model; nobody writes to it."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    depcut.save(heads(), folder)
    return folder
