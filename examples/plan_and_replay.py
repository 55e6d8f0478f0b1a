"""Save a plan, load it elsewhere, and get the same smaller model from the same weights."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import depcut


def build() -> nn.Module:
    """The model as its source code makes it."""
    return nn.Sequential(
        nn.Linear(16, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128), nn.GELU(),
        nn.Linear(128, 4),
    )  # fmt: skip


rows = torch.randn(2, 16)
trained = build()
plan = depcut.analyze(trained, rows).plan(0.4, of="params")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plan.json"
    plan.save(file)
    replayed = depcut.Plan.load(file)

here = plan.apply(trained, rows)
elsewhere = build()
elsewhere.load_state_dict(trained.state_dict())
there = replayed.apply(elsewhere, rows)

for name, tensor in here.state_dict().items():
    assert torch.equal(tensor, there.state_dict()[name]), name
before = sum(p.numel() for p in trained.parameters())
after = sum(p.numel() for p in here.parameters())
print(f"{before} parameters became {after}, twice the same")
