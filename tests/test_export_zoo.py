"""Public architectures as ONNX, dense and halved: they agree, and their files are halved, too.

A handful run by default, a few of the others with `-m sweep`, all of them with `-m exhaustive`.
`benchmarks/export.py` exports all of them, too.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import zoo
from oracle import read_tensors
from selection import swept
from torch import nn

import depcut

FAST = ("hf/bert",)

# Of the dense file: bytes that the slim one may have lost more or less than the model's tensors.
# The graph and tables made of image sizes stay as they are; batch norms are folded away.
TOLERANCE = 0.02

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread", "zoo_libraries"),
]


@pytest.mark.parametrize("name", FAST)
def test_a_public_architecture(name: str, tmp_path: Path) -> None:
    assert_exported(name, tmp_path)


@pytest.mark.parametrize("name", swept((name for name in zoo.ZOO if name not in FAST), 50))
def test_every_public_architecture(name: str, tmp_path: Path) -> None:
    assert_exported(name, tmp_path)


def assert_exported(name: str, folder: Path) -> None:
    inputs, model = zoo.ZOO[name].inputs(2), zoo.build(name)
    slim = depcut.shrink(model, 0.5, inputs, rebuildable=False)
    dense = depcut.export(model, folder / "dense.onnx", inputs)
    narrow = depcut.export(slim, folder / "slim.onnx", inputs)
    for report in (dense, narrow):
        assert report.batch_sizes == (2, 3)
        assert report.max_rel_error < 1e-3
    assert narrow.bytes < dense.bytes
    lost = weight(model, inputs) - weight(slim, inputs)
    assert dense.bytes - narrow.bytes == pytest.approx(lost, abs=TOLERANCE * dense.bytes)
    assert "plan_digest" in {entry.key for entry in onnx.load(narrow.path).metadata_props}


def weight(model: nn.Module, inputs: zoo.Inputs) -> int:
    """Bytes of the parameters and buffers that inference reads."""
    return sum(tensor.nbytes for tensor in read_tensors(model, inputs))
