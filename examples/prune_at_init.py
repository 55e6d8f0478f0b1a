"""Prune before training: SNIP, GraSP and SynFlow rank the units of a network that has seen nothing.

Then the smaller network trains as any other. SynFlow (Tanaka et al., NeurIPS 2020) removes a little
at a time, which `depcut.training.iterate` does without a retrain function.
"""

import torch
from torch import nn
from torch.nn import functional

import depcut

torch.manual_seed(0)
rows = torch.randn(512, 20)
labels = (rows[:, :10].sum(1) > rows[:, 10:].sum(1)).long()


def fresh() -> nn.Module:
    """The same random network every time."""
    torch.manual_seed(1)
    layers = [nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 2))


def train(net: nn.Module) -> float:
    """Full-batch training from scratch; the last loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(150):
        loss = functional.cross_entropy(net(rows), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# Compensation repairs trained layers; here there is nothing to repair yet.
data = {"data": [(rows, labels)], "loss": functional.cross_entropy, "compensate": False}
snip = depcut.shrink(fresh(), 0.7, rows[:2], score="snip", **data)
grasp = depcut.shrink(fresh(), 0.7, rows[:2], score="grasp", **data)
synflow = depcut.training.iterate(fresh(), 0.7, rows[:2], steps=20, score="synflow", align=1).model
chance = depcut.shrink(fresh(), 0.7, rows[:2], score="random")

for name, net in {"snip": snip, "grasp": grasp, "synflow": synflow, "chance": chance}.items():
    widths = (net[0].out_features, net[2].out_features)
    loss = train(net)
    print(f"{name}: {widths[0]} and {widths[1]} of 64 units, loss {loss:.4f} after training")
    assert loss < 0.2
