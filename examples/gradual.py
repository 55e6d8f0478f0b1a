"""Prune while training: masks grow along a schedule, then become a smaller model."""

import torch
from torch import nn
from torch.nn import functional

import depcut

torch.manual_seed(0)
rows = torch.randn(512, 20)
labels = (rows[:, :10].sum(1) > rows[:, 10:].sum(1)).long()

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
gradual = depcut.training.Gradual(model, 0.7, rows[:2], start=20, end=200, every=20)

for step in range(300):
    loss = functional.cross_entropy(model(rows), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    gradual.step()  # ranks all units anew every 20 steps, masked ones included
    if step % 60 == 0:
        print(f"step {step}: loss {loss.item():.4f}, {gradual.removed:.0%} of the MACs masked")

slim = gradual.commit(optimizer=optimizer)
difference = (slim(rows) - model(rows)).abs().max().item()
widths = (slim[0].out_features, slim[2].out_features)
print(f"{widths[0]} and {widths[1]} of 64 units left, outputs off by {difference:.1e}")
assert difference < 1e-4
assert loss.item() < 0.2
