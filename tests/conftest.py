"""Fixtures that several files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
import zoo
from shares import share_out

if "PYTEST_XDIST_WORKER" in os.environ:
    # Side by side, threads of one worker would wait for those of the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave a share of what is shown of many nets alike to the sweep."""
    share_out(items)


@pytest.fixture(scope="module", autouse=True)
def small_collections() -> None:
    """Garbage collections pass by what the imports left: half a million objects.

    Training, ONNX export and every measurement collect, each at the price of a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small nets are slower on several threads, which wait on each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def zoo_libraries() -> None:
    """Skips where a library of the zoo is not installed."""
    for name in ("torchvision", "timm", "transformers"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    zoo.libraries()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """No precision or device that an earlier Accelerator of this process, or a Trainer's, chose."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def only_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No class is patched, so that modules are generated where code cannot express the sizes."""
    monkeypatch.setattr("depcut.rewrite.build.patches", lambda *_: ({}, {}))
