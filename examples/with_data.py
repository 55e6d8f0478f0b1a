"""Shrink with calibration data: units are ranked by what they are worth, weights are re-solved."""

import torch
from torch import nn
from torch.nn import functional

import depcut

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
)  # fmt: skip
inputs = torch.randn(512, 8)
targets = (inputs[:, :3] * inputs[:, 3:6]).argmax(1)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for _ in range(200):
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
model.eval()

batches = list(zip(inputs.split(64), targets.split(64), strict=True))
analysis = depcut.analyze(model, inputs[:2])
data = analysis.calibrate(batches, progress=False)
plan = analysis.plan(0.6, data=data)
repaired = plan.apply(model, data=data)
plain = analysis.plan(0.6).apply(model)

print(depcut.report(repaired))
losses = {
    name: float(functional.cross_entropy(net(inputs), targets).detach())
    for name, net in (("dense", model), ("repaired", repaired), ("magnitude", plain))
}
for name, loss in losses.items():
    print(f"{name}: loss {loss:.3f}")
assert losses["repaired"] - losses["dense"] < 0.5 * (losses["magnitude"] - losses["dense"])
