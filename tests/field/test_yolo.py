"""A detector as Ultralytics writes one, through all that its trainer and exporter do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yolo_nets

import depcut

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def slim() -> Any:
    net = yolo_nets.detector()
    with torch.no_grad():
        net(X)  # which fills the cached anchors
    return depcut.shrink(net, 0.5, X)


def assert_close(model: Any, other: Any, x: torch.Tensor = X, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        wanted, got = model(x)[0].float(), other(x.to(next(other.parameters()).dtype))[0].float()
    assert float((wanted - got).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.sweep
def test_it_runs_trains_and_is_averaged(slim: Any) -> None:
    assert depcut.report(slim).macs[1] < 0.51 * depcut.report(slim).macs[0]
    assert not depcut.report(slim).generated
    other_size = torch.randn(1, 3, 96, 32)
    assert slim(other_size)[0].shape == (1, 9, 240)
    training = copy.deepcopy(slim).train()
    training({"img": X}).backward()
    ema = yolo_nets.ModelEMA(training)
    ema.update(training)
    assert type(ema.ema) is type(slim)
    assert ema.ema.names == slim.names


@pytest.mark.sweep
def test_half_precision_and_fused_norms(slim: Any, tmp_path: Path) -> None:
    half = copy.deepcopy(slim).half()
    torch.save(half.state_dict(), tmp_path / "half.pt")
    again = copy.deepcopy(slim)
    again.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    assert_close(slim, again, tolerance=2e-3)
    assert_close(slim, half, tolerance=2e-2)
    fused = copy.deepcopy(slim)
    with torch.no_grad():
        fused.fuse()
    assert_close(slim, fused)


@pytest.mark.sweep
def test_a_fused_one_shrinks_and_a_slim_one_is_exported(slim: Any, tmp_path: Path) -> None:
    dense = yolo_nets.detector()
    with torch.no_grad():
        dense.fuse()
    assert depcut.report(depcut.shrink(dense, 0.5, X)).macs[1] < 10_000_000
    exported = copy.deepcopy(slim)
    exported.model[-1].export = True
    assert depcut.export(exported, tmp_path / "slim.onnx", X).max_rel_error < 1e-4
