"""Shrink a convolutional net by half of its MACs, export it and measure what was won."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import depcut


class Net(nn.Module):
    """A stem, a residual block and a classifier; nothing in it knows of depcut."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.conv2(self.conv1(x).relu())
        return self.head(x.mean((2, 3)))


model = Net().eval()
images = torch.randn(2, 3, 32, 32)

analysis = depcut.analyze(model, images)
print(analysis)
print(analysis.explain("conv1"))

slim = depcut.shrink(model, 0.5, images)
assert type(slim) is Net
assert slim(images).shape == model(images).shape

with tempfile.TemporaryDirectory() as folder:
    print(depcut.export(slim, Path(folder) / "slim.onnx", images))
print(depcut.compare(model, slim, images))
