"""Shrink in the middle of training: the optimizer's state is sliced along and training goes on."""

import torch
from torch import nn
from torch.nn import functional

import depcut

torch.manual_seed(0)
rows = torch.randn(512, 20)
labels = (rows[:, :10].sum(1) > rows[:, 10:].sum(1)).long()

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int) -> float:
    """Full-batch training; the last loss."""
    net.train()
    for _ in range(steps):
        loss = functional.cross_entropy(net(rows), labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


dense_loss = train(model, optimizer, 200)
slim = depcut.shrink(model, 0.5, rows[:2], optimizer=optimizer)
slim_loss = train(slim, optimizer, 100)
print(f"loss {dense_loss:.4f} dense, {slim_loss:.4f} slim after retraining")
assert slim_loss < 0.3
