"""Tiny nets, one a structure: what the compiler must couple, narrow, or leave alone.

Every net is a class without constructor arguments, registered with the inputs that it takes. Sizes
are small and, where the structure allows it, all different, so that nothing can be right by luck.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
MakeInputs = Callable[[int], Inputs]


@dataclass(frozen=True)
class Net:
    """One structure and what is known about it.

    Attributes:
        name: the structure, as tests call it.
        build: makes the module, in eval mode, the same one every time.
        inputs: makes the inputs for a batch size.
        prunable: sorted sizes of all groups of two units or more where the structure settles them,
            else the smallest number of such groups.
        held: sizes of the groups that zeroing consumers says nothing about, because a norm, mean or
            softmax reduces them or two activations are contracted over them.
        same_class: the class's own code can express every narrower width.
        tolerance: largest error of an output, relative to the largest output.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: MakeInputs
    prunable: int | tuple[int, ...]
    held: tuple[int, ...] = ()
    same_class: bool = True
    tolerance: float = 1e-5

    @property
    def exact(self) -> bool:
        """Whether zeroing consumers says what pruning must give, for every group."""
        return not self.held


NETS: dict[str, Net] = {}


def net(
    name: str,
    inputs: MakeInputs,
    prunable: int | tuple[int, ...],
    *,
    held: tuple[int, ...] = (),
    same_class: bool = True,
    tolerance: float = 1e-5,
) -> Callable[[Callable[[], nn.Module]], Any]:
    """Register the decorated class (or factory) as the net `name`."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if name in NETS:
            raise ValueError(f"two nets are called {name!r}")
        build = partial(seeded, make, zlib.crc32(name.encode()))
        NETS[name] = Net(name, build, inputs, prunable, held, same_class, tolerance)
        return make

    return register


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build with a fixed seed and leave no bias, statistic or scale at its neutral value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(make()).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every bias, norm parameter and running statistic a value that a leak would show in."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "running_mean" or "bias" in leaf:
            tensor.normal_(0.0, 0.3)
        elif leaf == "running_var" or (leaf == "weight" and tensor.dim() == 1):
            tensor.uniform_(0.5, 1.5)
    return model


# Inputs -------------------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def features(size: int = 6) -> MakeInputs:
    return lambda batch: normal(batch, size)


def sequence(size: int = 6, length: int = 5) -> MakeInputs:
    return lambda batch: normal(batch, length, size)


def image(channels: int = 3, size: int = 8) -> MakeInputs:
    return lambda batch: normal(batch, channels, size, size)


def signal(channels: int = 3, length: int = 9) -> MakeInputs:
    return lambda batch: normal(batch, channels, length)


def volume(channels: int = 3, size: int = 4) -> MakeInputs:
    return lambda batch: normal(batch, channels, size, size, size)


def tokens(length: int = 7, vocabulary: int = 20) -> MakeInputs:
    return lambda batch: integers(vocabulary, batch, length)


# Shared pieces ------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Head(nn.Module):
    """Mean over all places, then a classifier of five classes."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.flatten(2).mean(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


# Chains and residuals -----------------------------------------------------------------------------


@net("plain", image(), prunable=(8, 12))
class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), conv(8, 12), Head(12))


@net("mlp", features(), prunable=(7, 9))
class PlainMLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 9),
            nn.BatchNorm1d(9),
            nn.Sigmoid(),
            nn.Linear(9, 7),
            nn.GELU(),
            nn.Linear(7, 5),
        )


@net("double_precision", lambda batch: normal(batch, 6).double(), prunable=(9,))
class DoublePrecision(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 5))
        self.double()


@net("residual", image(), prunable=(8, 12))
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1 = conv(8, 12)
        self.conv2 = conv(12, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.conv2(self.conv1(x))))


@net("residual_projection", image(), prunable=(6, 10, 14))
class ResidualProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.body = nn.Sequential(conv(6, 10, stride=2), conv(10, 14))
        self.shortcut = conv(6, 14, 1, stride=2)
        self.head = Head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y += self.shortcut(x)
        return self.head(y)


@net("residual_preactivation", image(), prunable=(8, 12))
class ResidualPreactivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.norm3, self.head = nn.BatchNorm2d(8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.norm1(x)))
        x = x + self.conv2(F.relu(self.norm2(y)))
        return self.head(F.relu(self.norm3(x)))


@net("inverted_residual", image(), prunable=(5, 6, 14))
class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.expand = conv(6, 14, 1)
        self.depthwise = conv(14, 14, groups=14)
        self.excite = SqueezeExcite(14, 5)
        self.project = nn.Sequential(nn.Conv2d(14, 6, 1), nn.BatchNorm2d(6))
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.excite(self.depthwise(self.expand(x)))
        return self.head(x + self.project(y))


@net("padded_shortcut", image(), prunable=(3, 3, 8, 10))
class PaddedShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.body = nn.Sequential(conv(8, 10, stride=2), conv(10, 14))
        self.before, self.after = 3, 3
        self.head = Head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))
        return self.head(self.body(x) + shortcut)


@net("layer_scale", image(), prunable=(8, 12))
class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.body = nn.Sequential(conv(8, 12), nn.Conv2d(12, 8, 1))
        self.gamma = nn.Parameter(torch.rand(8))
        self.beta = nn.Parameter(torch.rand(8, 1, 1))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x) * self.gamma.reshape(1, -1, 1, 1)
        return self.head(x + y + self.beta)


@net("constant_buffers", image(), prunable=(8, 12))
class ConstantBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 12), Head(12)
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(12, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x) / self.scale) - self.shift)


@net("frozen_parameters", image(), prunable=(8, 12))
class FrozenParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 12), Head(12)
        self.stem.requires_grad_(False)
        self.head.classifier.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


@net("prelu", image(), prunable=(8, 12))
class PerChannelSlope(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 12, 3), nn.PReLU(), nn.Dropout(), Head(12)
        )


@net("padding_modes", image(), prunable=(4, 6, 8))
class PaddingModes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding="same"),
            nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
            nn.ZeroPad2d(1),
            nn.Conv2d(6, 4, 3, dilation=2),
            Head(4),
        )


# Concatenation ------------------------------------------------------------------------------------


@net("concat", image(), prunable=(6, 7, 10))
class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 6), conv(3, 10)
        self.fuse, self.head = conv(16, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(torch.cat([self.left(x), self.right(x)], 1)))


@net("concat_nested", image(), prunable=(4, 6, 9))
class ConcatNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 4), conv(3, 6)
        self.fuse, self.head = conv(26, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        y = torch.cat([torch.cat([a, b], 1), b, torch.cat([b, a], 1)], 1)
        return self.head(self.fuse(y))


@net("concat_itself", image(), prunable=(6, 7))
class ConcatItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 6), conv(12, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.fuse(torch.cat([x, x], 1)))


@net("concat_plus_whole", image(), prunable=(6, 7, 10))
class ConcatPlusWhole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.whole = conv(3, 6), conv(3, 10), conv(3, 16)
        self.fuse, self.head = conv(16, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x)], 1) + self.whole(x)
        return self.head(self.fuse(y))


@net("concat_plus_concat", image(), prunable=(2, 4, 7, 10))
class ConcatPlusConcat(nn.Module):
    """Cuts after 6 and after 4 of 16 channels: the pieces are 4, 2 and 10."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), conv(3, 10)
        self.c, self.d = conv(3, 4), conv(3, 12)
        self.fuse, self.head = conv(16, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1) + torch.cat([self.c(x), self.d(x)], 1)
        return self.head(self.fuse(y))


class ConcatAlong(nn.Module):
    """Two layers joined along one dimension; the same layer kind reads what they made."""

    def __init__(self, kind: type[nn.Module], dim: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.left, self.right = kind(3, 6, *kernel), kind(3, 6, *kernel)
        self.fuse = kind(12 if dim == 1 else 6, 7, *kernel)
        self.classifier = nn.Linear(7, 5)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        y = self.fuse(torch.cat([self.left(x).sigmoid(), self.right(x).tanh()], self.dim)).relu()
        return self.classifier(y.flatten(2).mean(2) if y.dim() > 2 else y)


for _kind, _inputs, _rank in [
    (nn.Linear, features(3), 2),
    (nn.Conv1d, signal(), 3),
    (nn.Conv2d, image(), 4),
    (nn.Conv3d, volume(), 5),
]:
    for _dim in range(_rank):
        net(
            f"concat_rank{_rank}_dim{_dim}",
            _inputs,
            prunable=(6, 6, 7) if _dim == 1 else (6, 7),
        )(partial(ConcatAlong, _kind, _dim, () if _rank == 2 else (1,)))


@net("concat_tokens", sequence(), prunable=(6, 7, 9))
class ConcatTokens(nn.Module):
    """Tokens joined along the length and features along the width, in 3-D."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.wide = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(6, 7)
        self.fuse, self.classifier = nn.Linear(16, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x).relu()], 1)
        z = torch.cat([y, self.wide(torch.cat([x, x], 1))], -1)
        return self.classifier(self.fuse(z).relu())


@net("dense_block", image(), prunable=(4, 4, 4, 6, 9))
class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3, padding=1))
            for width in (6, 10, 14)
        )
        self.transition, self.head = conv(18, 9, 1), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return self.head(self.transition(torch.cat(maps, 1)))


@net("unet", image(), prunable=(4, 5, 6))
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row_axis, self.inner = conv(3, 4), conv(4, 6)
        self.decoder, self.head = conv(10, 5), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.row_axis(x)
        y = self.inner(F.max_pool2d(skip, 2))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.decoder(torch.cat([skip, y], 1)))


# Splits and slices --------------------------------------------------------------------------------


@net("split_unequal", image(), prunable=(4, 5, 7, 12))
class SplitUnequal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = 4, 12
        self.stem, self.left, self.right = conv(3, 16), conv(4, 5), conv(12, 7)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).split([self.few, self.many], 1)
        return self.head(torch.cat([self.left(a), self.right(b)], 1))


@net("split_typed", image(), prunable=(4, 5, 7, 12), same_class=False)
class SplitTyped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 16), conv(4, 5), conv(12, 7)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.stem(x), [4, 12], dim=1)
        return self.head(torch.cat([self.left(a), self.right(b)], 1))


@net("split_halves_shared_module", image(), prunable=(7, 8))
class SplitHalvesShared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv(3, 16), conv(8, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.head(self.shared(a) + self.shared(b).tanh())


@net("split_half_through_itself", image(), prunable=(5, 7, 9))
class SplitHalfThroughItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = 5
        self.stem, self.shared = conv(3, 12), conv(5, 5)
        self.fuse, self.head = conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.shared(self.shared(x[:, : self.part]))
        return self.head(self.fuse(torch.cat([y, x[:, self.part :]], 1)))


@net("halves_swapped", image(), prunable=(6, 9))
class HalvesSwapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 12), conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = x.chunk(2, 1)
        return self.head(self.fuse(x + torch.cat([b, a], 1).sigmoid()))


@net("thirds_rotated", image(), prunable=(4, 9))
class ThirdsRotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 12), conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b, c = x.chunk(3, 1)
        return self.head(self.fuse(x * torch.cat([b, c, a], 1)))


class ChunkAndChain(nn.Module):
    """YOLO's C2f: every link of a chain over one half is kept and all are joined."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.stem, self.enter = conv(3, 6), conv(6, 10, 1)
        self.links = nn.ModuleList(nn.Sequential(conv(5, 7), conv(7, 5)) for _ in range(2))
        self.leave, self.head = conv(20, 9, 1), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(self.stem(x)).chunk(2, 1))
        for link in self.links:
            y = link(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.head(self.leave(torch.cat(parts, 1)))


net("chunk_and_chain", image(), prunable=(5, 5, 5, 5, 6, 7, 7, 9))(partial(ChunkAndChain, False))
net("chunk_and_chain_shortcut", image(), prunable=(5, 5, 6, 7, 7, 9))(partial(ChunkAndChain, True))


@net("index_slices", image(), prunable=(3, 4, 5, 7))
class IndexSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = 3, 8
        self.stem = conv(3, 12)
        self.a, self.b, self.c = conv(3, 7), conv(5, 7), conv(4, 7)
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b, c = x[:, : self.first], x[:, self.first : self.second], x[:, self.second :]
        return self.head(self.a(a) + self.b(b) * self.c(c))


@net("negative_slices", image(), prunable=(4, 7, 8), same_class=False)
class NegativeSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 12), conv(8, 7), conv(4, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.a(x[:, :-4]) + self.b(x[:, -4:]))


@net("strided_slices", image(), prunable=1, same_class=False)
class StridedSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 12), conv(6, 7), conv(6, 9), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.a(x[:, ::2]), self.b(x[:, 1::2])], 1))


@net("selected_channel", image(), prunable=(3, 4, 11), same_class=False)
class SelectedChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 8), conv(8, 11), Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.fuse(x * x[:, 3].unsqueeze(1).sigmoid()))


@net("copy_into_slices", image(), prunable=(5, 7, 9), same_class=False)
class CopyIntoSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = 5, 7
        self.a, self.b, self.fuse, self.head = conv(3, 5), conv(3, 7), conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y = x.new_zeros(batch, self.left + self.right, height, width)
        y[:, : self.left] = self.a(x)
        y[:, self.left :] = self.b(x)
        return self.head(self.fuse(y))


@net("overwrite_slice", image(), prunable=(5, 7, 9), same_class=False)
class OverwriteSlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = 5
        self.stem, self.inner, self.fuse, self.head = conv(3, 12), conv(5, 5), conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).clone()
        x[:, : self.part] = self.inner(x[:, : self.part].clone())
        return self.head(self.fuse(x))


@net("unbind_and_stack", image(), prunable=(4, 9), same_class=False)
class UnbindAndStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = 3
        self.stem, self.fuse, self.head = conv(3, 12), conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.stem(x).unflatten(1, (self.parts, -1)).unbind(1)
        return self.head(self.fuse(torch.stack([a, b * c, c.tanh()], 1).flatten(1, 2)))


@net("roll_channels", image(), prunable=1, same_class=False)
class RollChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fuse = conv(3, 8), conv(8, 11), conv(11, 9)
        self.head = Head(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(torch.roll(self.body(self.stem(x)), 2, 1)))


@net("flip_channels", image(), prunable=1, same_class=False)
class FlipChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 8), conv(8, 11), Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.fuse(x + x.flip(1).sigmoid()))


# Shuffles and rearrangements ----------------------------------------------------------------------


def shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return x.reshape(batch, channels, height, width)


@net("channel_shuffle", image(), prunable=1, same_class=False)
class ChannelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 12), conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(shuffle(self.stem(x), 3)))


@net("channel_shuffle_grouped", image(), prunable=1, same_class=False)
class ChannelShuffleGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = 3
        self.stem, self.enter = conv(3, 12), conv(12, 12, 1, groups=3)
        self.depthwise, self.leave = conv(12, 12, groups=12), conv(12, 12, 1, groups=3)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.leave(self.depthwise(shuffle(self.enter(x), self.groups)))
        return self.head(x + y)


@net("channel_shuffle_in_a_row", image(), prunable=1, same_class=False)
class ChannelShuffleInARow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = conv(3, 12), conv(12, 12, groups=12), Head(12)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x = shuffle(shuffle(self.stem(x), 2), 2)
        return self.head(self.shuffle(self.middle(shuffle(x, 3))))


@net("shuffle_unit", image(), prunable=2, same_class=False)
class ShuffleUnit(nn.Module):
    """Two units of ShuffleNetV2: half passes, half is worked on, then they mix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.branches = nn.ModuleList(
            nn.Sequential(conv(6, 6, 1), conv(6, 6, groups=6), conv(6, 6, 1)) for _ in range(2)
        )
        self.fuse, self.head = conv(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            a, b = x.chunk(2, 1)
            x = shuffle(torch.cat([a, branch(b)], 1), 2)
        return self.head(self.fuse(x))


@net("pixel_shuffle", image(size=4), prunable=(5, 7))
class PixelShuffleNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 20, 3), nn.PixelShuffle(2), nn.SiLU(), conv(5, 7), Head(7))


@net("pixel_unshuffle", image(), prunable=(5, 7))
class PixelUnshuffleNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 5), nn.PixelUnshuffle(2), conv(20, 7), Head(7))


@net("focus", image(), prunable=(6, 7))
class Focus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 6), conv(24, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        corners = [x[..., row::2, column::2] for column in range(2) for row in range(2)]
        return self.head(self.fuse(torch.cat(corners, 1)))


@net("unfold", image(), prunable=(5, 8))
class Unfold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.classifier = conv(3, 5), nn.Linear(45, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(self.stem(x), 3, padding=1)
        return self.classifier(self.mix(columns.transpose(1, 2)).relu().mean(1))


@net("unfold_and_fold", image(), prunable=(5, 7))
class UnfoldAndFold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 5), conv(5, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        columns = F.unfold(x, 3, padding=1).sigmoid()
        return self.head(self.fuse(x + F.fold(columns, x.shape[-2:], 3, padding=1)))


@net("tensor_unfold", signal(), prunable=(5, 8))
class TensorUnfold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv1d(3, 5, 1), nn.Linear(15, 8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.stem(x).unfold(2, 3, 2).permute(0, 2, 1, 3).flatten(2)
        return self.classifier(self.mix(windows).relu().mean(1))


@net("repeat", image(), prunable=2, same_class=False)
class Repeat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 6), conv(12, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(self.stem(x).repeat(1, 2, 1, 1)))


@net("repeat_interleave", image(), prunable=2, same_class=False)
class RepeatInterleave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 6), conv(12, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(self.stem(x).repeat_interleave(2, dim=1)))


@net("maxout", image(), prunable=2, same_class=False)
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pieces = 3
        self.stem, self.fuse, self.head = nn.Conv2d(3, 12, 3), conv(4, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(self.stem(x).unflatten(1, (-1, self.pieces)).amax(2)))


# Flatten, views and layouts -----------------------------------------------------------------------


@net("flatten_linear", image(size=8), prunable=(8, 10))
class FlattenLinear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 8, stride=2), nn.Flatten(), nn.Linear(128, 10), nn.ReLU(), nn.Linear(10, 5)
        )


@net("adaptive_flatten", image(), prunable=(8, 10), same_class=False)
class AdaptiveFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, 8), nn.AdaptiveAvgPool2d((2, 3))
        self.hidden, self.classifier = nn.Linear(48, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x)).view(-1, 8 * 2 * 3)
        return self.classifier(self.hidden(x).sigmoid())


@net("linear_view_deconv", features(), prunable=(5, 7))
class LinearViewDeconv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels = 7
        self.project = nn.Linear(6, 63)
        self.grow = nn.ConvTranspose2d(7, 5, 4, 2, 1)
        self.norm = nn.BatchNorm2d(5)
        self.out = nn.ConvTranspose2d(5, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x).sigmoid().view(-1, self.channels, 3, 3)
        return self.out(F.relu(self.norm(self.grow(x))))


@net("gram_matrix", image(), prunable=1, same_class=False)
class GramMatrix(nn.Module):
    """Bilinear pooling: the same channels index both sides of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.classifier = conv(3, 6), nn.Linear(36, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        gram = torch.bmm(x, x.transpose(1, 2)).flatten(1) / 64
        return self.classifier(self.hidden(gram).sigmoid())


@net("nhwc_layernorm", image(), prunable=(8, 12), held=(8,))
class LayerNormNHWC(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mlp, self.head = conv(3, 8), nn.LayerNorm(8), MLP(8, 12), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.mlp(self.norm(x.permute(0, 2, 3, 1)))
        return self.head(x + y.permute(0, 3, 1, 2))


@net("layernorm_by_hand", image(), prunable=(8, 12), held=(8,))
class LayerNormByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 8), conv(8, 12), Head(12)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.head(self.fuse(self.weight[:, None, None] * x + self.bias[:, None, None]))


@net("layernorm_over_map", image(size=6), prunable=1, held=(8,))
class LayerNormOverMap(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), nn.LayerNorm([8, 6, 6]), conv(8, 12), Head(12))


@net("patch_merging", image(), prunable=(6, 10), held=(6,))
class PatchMerging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 1), nn.LayerNorm(24)
        self.reduction, self.classifier = nn.Linear(24, 10, bias=False), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        corners = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        x = self.reduction(self.norm(torch.cat(corners, -1)))
        return self.classifier(x.relu().mean((1, 2)))


@net("mlp_mixer", image(), prunable=(7, 10, 13), held=(10,))
class MLPMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 10, 2, 2)
        self.norm1, self.mix_tokens = nn.LayerNorm(10), MLP(16, 7)
        self.norm2, self.mix_channels = nn.LayerNorm(10), MLP(10, 13)
        self.classifier = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.mix_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.mix_channels(self.norm2(x))
        return self.classifier(x.mean(1))


# Gates --------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.squeeze(F.adaptive_avg_pool2d(x, 1))
        return x * F.hardsigmoid(self.excite(F.relu(gate)))


class SqueezeExciteLinear(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        gate = self.gate(x.mean((2, 3)).view(batch, channels))
        return x * gate.view(batch, channels, 1, 1).expand_as(x)


@net("squeeze_excite", image(), prunable=(4, 8, 11))
class SqueezeExciteNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), SqueezeExcite(8, 4), conv(8, 11), Head(11))


@net("squeeze_excite_linear", image(), prunable=(4, 8, 11))
class SqueezeExciteLinearNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), SqueezeExciteLinear(8, 4), conv(8, 11), Head(11))


class ChannelConvolution(nn.Module):
    """ECA: a convolution *along* the channels, so the channels are places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * gate.transpose(1, 2).unsqueeze(-1)


@net("channel_convolution", image(), prunable=(11,))
class ChannelConvolutionNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), ChannelConvolution(), conv(8, 11), Head(11))


@net("selective_kernel", image(), prunable=2, same_class=False)
class SelectiveKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = conv(3, 8), conv(3, 8, 5)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1)
        self.fuse, self.head = conv(8, 11), Head(11)

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([self.small(x), self.large(x)], 1)
        gate = self.excite(self.squeeze(paths.sum(1).mean((2, 3), keepdim=True)).relu())
        gate = gate.view(x.shape[0], 2, 8, 1, 1).softmax(1)
        return self.head(self.fuse((paths * gate).sum(1)))


@net("one_channel_mask", image(), prunable=(8, 11))
class OneChannelMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mask, self.fuse = conv(3, 8), nn.Conv2d(8, 1, 1), conv(8, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.fuse(x * self.mask(x).sigmoid()))


@net("spatial_gate", image(), prunable=1, held=(8,))
class SpatialGate(nn.Module):
    """CBAM: mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mask, self.fuse = conv(3, 8), nn.Conv2d(2, 1, 3, padding=1), conv(8, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mask = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(self.fuse(x * self.mask(mask).sigmoid()))


@net("swiglu_chunk", sequence(), prunable=(9, 10))
class SwiGLUChunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Linear(6, 9), nn.Linear(9, 20)
        self.down, self.classifier = nn.Linear(10, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate, value = self.up(x).chunk(2, -1)
        return self.classifier(x + self.down(F.silu(gate) * value))


@net("swiglu_separate", sequence(), prunable=(9, 10))
class SwiGLUSeparate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.up = nn.Linear(6, 9), nn.Linear(9, 10), nn.Linear(9, 10)
        self.down, self.classifier = nn.Linear(10, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.classifier(x + self.down(F.silu(self.gate(x)) * self.up(x)))


@net("glu", image(), prunable=(7, 9))
class GLUNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 14, 3), nn.GLU(1), conv(7, 9), Head(9))


# Convolutions of every kind -----------------------------------------------------------------------


@net("grouped", image(), prunable=(3, 4, 6, 7))
class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 12), conv(12, 18, groups=3), conv(18, 7), Head(7))


@net("grouped_bottleneck", image(), prunable=2)
class GroupedBottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.body = nn.Sequential(conv(8, 12, 1), conv(12, 12, groups=4), nn.Conv2d(12, 8, 1))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.body(x))


@net("depthwise", image(), prunable=(8, 12))
class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), conv(8, 8, groups=8), conv(8, 12, 1), Head(12))


@net("depthwise_multiplier", image(), prunable=(2, 6, 9))
class DepthwiseMultiplier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 6), conv(6, 12, groups=6), conv(12, 9, 1), Head(9))


@net("transposed", image(size=4), prunable=(6, 7, 10))
class Transposed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 6), nn.ConvTranspose2d(6, 10, 2, 2), nn.BatchNorm2d(10), conv(10, 7), Head(7)
        )


@net("transposed_grouped", image(size=4), prunable=2)
class TransposedGrouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 12), nn.ConvTranspose2d(12, 9, 2, 2, groups=3), nn.SiLU(), conv(9, 7), Head(7)
        )


@net("transposed_depthwise", image(size=4), prunable=(7, 8))
class TransposedDepthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.SiLU(), conv(8, 7), Head(7)
        )


@net("conv1d", signal(), prunable=(6, 9))
class Conv1dNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(3, 6, 3),
            nn.BatchNorm1d(6),
            nn.GELU(),
            nn.MaxPool1d(2),
            nn.Conv1d(6, 9, 2),
            Head(9),
        )


@net("conv3d", volume(), prunable=(4, 7))
class Conv3dNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ELU(), nn.AvgPool3d(2),
            nn.Conv3d(4, 7, 1), nn.SiLU(), Head(7),
        )  # fmt: skip


@net("functional_conv", image(), prunable=(7, 9))
class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(7, 3, 3, 3) / 5)
        self.second = nn.Parameter(torch.randn(9, 7, 3, 3) / 8)
        self.head = Head(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(F.conv2d(x, self.first).sigmoid(), self.second).relu())


# Norms --------------------------------------------------------------------------------------------


@net("instance_norm", image(), prunable=(8, 12))
class InstanceNormNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.SiLU(),
            nn.Conv2d(8, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.SiLU(), Head(12),
        )  # fmt: skip


@net("group_norm", image(), prunable=1, held=(4,))
class GroupNormNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.SiLU(), conv(12, 7), Head(7))


@net("rms_norm", sequence(), prunable=(9, 13), held=(9,))
class RMSNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mlp = nn.Linear(6, 9), nn.RMSNorm(9), MLP(9, 13)
        self.classifier = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.classifier(x + self.mlp(self.norm(x)))


@net("rms_norm_by_hand", sequence(), prunable=(9, 13), held=(9,))
class RMSNormByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.classifier = nn.Linear(6, 9), MLP(9, 13), nn.Linear(9, 5)
        self.weight = nn.Parameter(torch.rand(9) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.classifier(x + self.mlp(self.weight * (x * scale)))


@net("weight_norm", image(), prunable=2)
class WeightNormNet(nn.Sequential):
    def __init__(self) -> None:
        weight_norm = nn.utils.parametrizations.weight_norm
        super().__init__(
            weight_norm(nn.Conv2d(3, 8, 3)),
            nn.SiLU(),
            weight_norm(nn.Conv2d(8, 12, 3)),
            nn.SiLU(),
            Head(12),
        )


@net("weight_norm_hook", image(), prunable=2)
class WeightNormHook(nn.Sequential):
    def __init__(self) -> None:
        first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(first)
            nn.utils.weight_norm(second)
        super().__init__(first, nn.SiLU(), second, nn.SiLU(), Head(12))
        with torch.no_grad():  # the hooks leave a weight that can be copied
            self(torch.zeros(1, 3, 8, 8))


@net("weight_standardised", image(), prunable=1, held=(8,))
class WeightStandardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), nn.Conv2d(8, 12, 3), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.head(F.conv2d(self.stem(x), weight, self.body.bias).relu())


@net("unit_vectors", sequence(), prunable=1, held=(9,))
class UnitVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.classifier = nn.Linear(6, 9), MLP(9, 13), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.mlp(F.normalize(self.embed(x), dim=-1)))


@net("softmax_over_channels", image(), prunable=1, held=(8,))
class SoftmaxOverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 8), conv(8, 11), Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(self.stem(x).softmax(1)))


@net("cumulative_channels", image(), prunable=(11,))
class CumulativeChannels(nn.Module):
    """Every channel is a sum over the ones before it: none of them can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 8), conv(8, 11), Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fuse(self.stem(x).cumsum(1)))


@net("neighbour_norm", image(), prunable=(11,))
class NeighbourNorm(nn.Sequential):
    """Local response normalisation looks at a channel's neighbours: they must stay in place."""

    def __init__(self) -> None:
        super().__init__(conv(3, 8), nn.LocalResponseNorm(3), conv(8, 11), Head(11))


# Attention ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """An embedding of ten features, attention as a residual branch, a classifier."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention, self.classifier = nn.Linear(6, 10), attention, nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.classifier((x + self.attention(x)).mean(1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(4)
    return scores.softmax(-1) @ v


class FusedQKV(nn.Module):
    def __init__(self, width: int = 10, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v).transpose(1, 2).reshape(batch, length, self.heads * self.head_dim)
        return self.proj(x)


class ChunkedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 3, 4
        self.qkv, self.proj = nn.Linear(10, 36), nn.Linear(12, 10)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SeparateQKV(nn.Module):
    """Keys of four features a head, values of five."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 15)
        self.out = nn.Linear(15, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class TypedHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 12)
        self.out = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = (f(x).view(batch, -1, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).transpose(1, 2).reshape(batch, -1, 12))


class WidthOverHeads(nn.Module):
    """Head size computed from the input's width, which may shrink while the heads do not."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(10, 30), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, length, width))


class GroupedQuery(nn.Module):
    """Two key heads, each read by three query heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.kv_heads, self.repeats, self.head_dim = how, 2, 3, 4
        self.q, self.k, self.v = nn.Linear(10, 24), nn.Linear(10, 8), nn.Linear(10, 8)
        self.out = nn.Linear(24, 10)

    def widen(self, x: Tensor) -> Tensor:
        if self.how == "sdpa":
            return x
        if self.how == "repeat_interleave":
            return x.repeat_interleave(self.repeats, 1)
        batch, heads, length, size = x.shape
        x = x[:, :, None].expand(batch, heads, self.repeats, length, size)
        return x.reshape(batch, heads * self.repeats, length, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = attend(q, self.widen(k), self.widen(v))
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(10, 3, 4)), nn.Parameter(torch.randn(10, 3, 4))
        self.v, self.o = nn.Parameter(torch.randn(10, 3, 5)), nn.Parameter(torch.randn(3, 5, 10))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnd,dhk->bhnk", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhqk,bhnk->bhqn", q, k).mul(0.1).softmax(-1)
        return torch.einsum("bhqn,bhnk,hkd->bqd", weights, v, self.o)


class NativeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(10, 7)
        self.attention = nn.MultiheadAttention(10, 2, kdim=7, vdim=7)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context(x).transpose(0, 1)
        return self.attention(x.transpose(0, 1), context, context)[0].transpose(0, 1)


def rotate_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class RotaryHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 6
        self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 8)
        self.out = nn.Linear(8, 10)
        self.register_buffer("frequency", 1.0 / 10 ** torch.linspace(0, 1, 3), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
        angle = torch.outer(places, self.frequency)
        angle = torch.cat([angle, angle], -1)
        return x * angle.cos() + rotate_halves(x) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k = (self.rotate(f(x).view(shape).transpose(1, 2)) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class RotaryInterleaved(RotaryHalves):
    def rotate(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
        angle = torch.outer(places, self.frequency)
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], angle.cos(), angle.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class QueryPooling(nn.Module):
    """One learned query; what it finds is added to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(10))
        self.value, self.out = nn.Linear(10, 7), nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ self.query).softmax(-1)
        return self.out(torch.sum(weights.unsqueeze(-1) * self.value(x), 1, keepdim=True))


def attention_net(
    name: str,
    make: Callable[[], nn.Module],
    prunable: int | tuple[int, ...],
    held: tuple[int, ...],
) -> None:
    net(name, sequence(), prunable, held=held)(lambda: Block(make()))


attention_net("attention_fused", FusedQKV, (3, 4, 10), (4,))
attention_net("attention_chunked", ChunkedQKV, (3, 4, 4, 10), (4,))
attention_net("attention_separate", SeparateQKV, (3, 4, 5, 10), (4,))
attention_net("attention_typed_heads", TypedHeads, (3, 4, 4, 10), (4,))
attention_net("attention_width_over_heads", WidthOverHeads, 3, (5,))
attention_net("attention_gqa_expand", partial(GroupedQuery, "expand"), (2, 3, 4, 4, 10), (4,))
attention_net(
    "attention_gqa_repeat", partial(GroupedQuery, "repeat_interleave"), (2, 3, 4, 4, 10), (4,)
)
attention_net("attention_gqa_sdpa", partial(GroupedQuery, "sdpa"), (2, 3, 4, 4, 10), (4,))
attention_net("attention_einsum", EinsumAttention, (3, 4, 5, 10), (4,))
attention_net("attention_native", NativeAttention, 1, (5,))
attention_net("attention_native_cross", CrossAttention, 1, (5,))
attention_net("attention_rotary_halves", RotaryHalves, (2, 3, 4, 10), (3,))
attention_net("attention_rotary_interleaved", RotaryInterleaved, (2, 3, 4, 10), (3,))
attention_net("attention_pooling", QueryPooling, (7, 10), ())


@net("transformer_encoder", sequence(12), prunable=1, held=(6, 12))
class TransformerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, activation="gelu")
        self.embed, self.classifier = nn.Linear(12, 12), nn.Linear(12, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.embed(x)))


@net("transformer_decoder", sequence(12), prunable=1, held=(6, 12))
class TransformerDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Linear(12, 12), nn.Linear(12, 12)
        self.layer = nn.TransformerDecoderLayer(12, 2, 20, batch_first=True, norm_first=True)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.classifier(self.layer(self.embed(x), self.memory(x), tgt_mask=mask))


@net("vision_transformer", image(), prunable=(3, 4, 12, 20), held=(4, 12))
class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 5, 12))
        self.norm1, self.attention = nn.LayerNorm(12), FusedQKV(12)
        self.norm2, self.mlp = nn.LayerNorm(12), MLP(12, 20)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class WindowAttention(nn.Module):
    """Attention in 2x2 windows with one learned bias a head and relative position."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)
        self.table = nn.Parameter(torch.randn(9, heads))
        places = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        offset = places[:, None] - places[None] + 1
        self.register_buffer("index", (offset[..., 0] * 3 + offset[..., 1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        windows, length, _ = x.shape
        qkv = self.qkv(x).reshape(windows, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)[0:3]
        bias = self.table[self.index].view(length, length, -1).permute(2, 0, 1).contiguous()
        weights = (q @ k.transpose(-2, -1) * 0.5 + bias.unsqueeze(0)).softmax(-1)
        x = (weights @ v).transpose(1, 2).reshape(windows, length, self.heads * self.head_dim)
        return self.proj(x)


@net("window_attention", image(size=4), prunable=(3, 5, 8), held=(5, 8))
class ShiftedWindows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.attention, self.classifier = WindowAttention(8, 3, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        y = self.attention(y.reshape(-1, 4, channels))
        y = y.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        y = torch.roll(y.reshape(batch, height, width, channels), (1, 1), (1, 2))
        return self.classifier((x + y).mean((1, 2)))


@net("attention_after_flatten", image(size=4), prunable=(3, 4, 5, 10), held=(4,))
class AttentionAfterFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, 10, 1), SeparateQKV(), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.head(x + y.reshape_as(x))


@net("causal_decoder", tokens(), prunable=(3, 4, 4, 10, 14), held=(4, 10))
class CausalDecoder(nn.Module):
    """A one-block GPT whose classifier is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(20, 10), nn.Embedding(7, 10)
        self.norm1, self.attention = nn.LayerNorm(10), CausalQKV()
        self.norm2, self.mlp, self.norm = nn.LayerNorm(10), MLP(10, 14), nn.LayerNorm(10)
        self.head = nn.Linear(10, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x))


class CausalQKV(ChunkedQKV):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(7, 7, dtype=torch.bool).tril().view(1, 1, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) * 0.5
        scores = scores.masked_fill(~self.mask[:, :, : x.shape[1], : x.shape[1]], -1e4)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


# Recurrent nets -----------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 9)
        self.cell = kind(9, 7, **options)
        self.classifier = nn.Linear(14 if options.get("bidirectional") else 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.cell(self.embed(x).relu())[0])


for _cell in (nn.LSTM, nn.GRU):
    for _suffix, _options in {
        "": {"batch_first": True},
        "_length_first": {},
        "_two_layers": {"num_layers": 2, "batch_first": True},
        "_bidirectional": {"num_layers": 2, "bidirectional": True, "batch_first": True},
        "_bidirectional_length_first": {"num_layers": 2, "bidirectional": True, "bias": False},
    }.items():
        net(f"{_cell.__name__.lower()}{_suffix}", sequence(), prunable=2)(
            partial(Recurrent, _cell, **_options)
        )


@net("lstm_last_state", sequence(), prunable=1)
class LSTMLastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.classifier = nn.LSTM(6, 7, batch_first=True), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, memory) = self.cell(x)
        return self.classifier(torch.cat([hidden[-1], memory[-1]], -1))


# Shared, tied and raw parameters ------------------------------------------------------------------


@net("module_called_twice", image(), prunable=(8,))
class ModuleCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv(3, 8), conv(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.stem(x))))


@net("module_under_two_names", image(), prunable=(8, 12))
class ModuleUnderTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.back, self.head = conv(3, 8), conv(8, 12), conv(12, 8), Head(8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.first(self.stem(x)))
        return self.head(self.back(self.second(x)))


@net("siamese", lambda batch: (normal(batch, 6), normal(batch, 6).flip(1)), prunable=(9,))
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.classifier((self.encoder(a).sigmoid() - self.encoder(b).sigmoid()).abs())


@net("tied_embedding", tokens(), prunable=(10, 14))
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mlp = nn.Embedding(20, 10), MLP(10, 14)
        self.head = nn.Linear(10, 20)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.mlp(x))


@net("tied_autoencoder", features(), prunable=(4, 9))
class TiedAutoencoder(nn.Module):
    """The decoder reads the encoder's weights the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4)
        self.bias = nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        code = self.second(self.first(x).sigmoid()).sigmoid()
        x = F.linear(code, self.second.weight.t(), self.bias).sigmoid()
        return x @ self.first.weight


@net("transposed_weights", sequence(), prunable=(9, 13))
class TransposedWeights(nn.Module):
    """GPT-2's Conv1D: weights stored as inputs by outputs, used by addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(9, 13) / 3), nn.Parameter(torch.randn(13))
        self.down, self.down_bias = (
            nn.Parameter(torch.randn(13, 9) / 3),
            nn.Parameter(torch.randn(9)),
        )
        self.embed, self.classifier = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = torch.addmm(self.up_bias, x.flatten(0, 1), self.up).sigmoid()
        y = torch.addmm(self.down_bias, y, self.down).view(x.shape)
        return self.classifier(x + y)


@net("matrix_products", sequence(), prunable=(7, 8, 9))
class MatrixProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9, 7))
        self.third, self.bias = nn.Parameter(torch.randn(7, 8)), nn.Parameter(torch.randn(8))
        self.fourth = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = torch.bmm(x, self.first.expand(batch, -1, -1)).sigmoid()
        x = torch.matmul(x, self.second).tanh()
        x = torch.baddbmm(self.bias, x, self.third.unsqueeze(0).expand(batch, -1, -1)).sigmoid()
        return torch.mm(x.sum(1), self.fourth.t())


@net("einsum_linear", sequence(), prunable=(4, 9))
class EinsumLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(4, 9))
        self.third = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bnd,df->bnf", x, self.first).sigmoid()
        x = torch.einsum("...f,ef->...e", x, self.second).sigmoid()
        return torch.einsum("bne,ek->bk", x, self.third)


@net("text_convolutions", tokens(), prunable=(5, 6, 7))
class TextConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 7)
        self.convs = nn.ModuleList([nn.Conv1d(7, 5, 2), nn.Conv1d(7, 6, 3)])
        self.classifier = nn.Linear(11, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        return self.classifier(torch.cat([conv(x).relu().amax(2) for conv in self.convs], 1))


def top_two(scores: Tensor) -> Tensor:
    values, chosen = scores.softmax(-1).topk(2, -1)
    return torch.zeros_like(scores).scatter(-1, chosen, values)


@net("experts", sequence(), prunable=(9, 10, 11, 12))
class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, 9), nn.Linear(9, 3)
        self.experts = nn.ModuleList(MLP(9, hidden) for hidden in (10, 11, 12))
        self.classifier = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gates = top_two(self.router(x))
        y = sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.classifier(x + y)


@net("stacked_experts", sequence(), prunable=2)
class StackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.classifier = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(9, 5)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, 9, 11)),
            nn.Parameter(torch.randn(4, 11, 9)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gates = top_two(self.router(x))
        hidden = torch.einsum("bnd,edf->bnef", x, self.up).sigmoid()
        y = torch.einsum("bnef,efd->bned", hidden, self.down)
        return self.classifier(x + torch.einsum("bned,bne->bnd", y, gates))


# The module around the layers ---------------------------------------------------------------------


@net("module_list", image(), prunable=(8, 10, 11, 12))
class ModuleListLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), Head(8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": conv(8, hidden), "down": conv(hidden, 8)})
            for hidden in (10, 11, 12)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["down"](block["up"](x))
        return self.head(x)


@net("nested_modules", image(), prunable=(8, 10, 12, 13))
class NestedModules(nn.Sequential):
    def __init__(self) -> None:
        inner = nn.Sequential(
            conv(8, 10), nn.Sequential(nn.Sequential(conv(10, 13)), nn.Identity())
        )
        super().__init__(nn.Sequential(conv(3, 8), inner), nn.Sequential(conv(13, 12), Head(12)))


@net(
    "dict_inputs",
    lambda batch: {"image": normal(batch, 3, 8, 8), "ids": integers(20, batch, 7)},
    prunable=(8, 9, 11),
)
class DictInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.see, self.read = conv(3, 8), nn.Embedding(20, 9)
        self.fuse, self.label, self.score = nn.Linear(17, 11), nn.Linear(11, 5), nn.Linear(11, 2)

    def forward(self, ids: Tensor, image: Tensor, scale: float = 2.0) -> dict[str, Any]:
        both = torch.cat([self.see(image).mean((2, 3)), self.read(ids).mean(1)], 1)
        hidden = self.fuse(both).sigmoid() * scale
        return {"label": self.label(hidden), "rest": (self.score(hidden), ids)}


@net(
    "masked_inputs",
    lambda batch: (normal(batch, 3, 8, 8), (normal(batch, 1, 8, 8) > 0).float()),
    prunable=(8, 11),
)
class MaskedInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fuse, self.head = conv(3, 8), conv(8, 11), Head(11)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x * mask)
        return self.head(self.fuse(torch.where(mask > 0, x, torch.zeros_like(x))))


@net("several_outputs", image(), prunable=(11,))
class SeveralOutputs(nn.Module):
    """The first map is an output, so its channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 11), Head(11)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        return self.head(self.body(x)), [x, x.mean((2, 3))]


@net("auxiliary_outputs", image(), prunable=(6, 8, 11))
class AuxiliaryOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 11), Head(11)
        self.auxiliary = nn.Sequential(conv(8, 6), Head(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return self.head(self.body(x)), self.auxiliary(x)


@net("training_only_head", image(), prunable=0)
class TrainingOnlyHead(nn.Module):
    """In eval mode nothing reads the auxiliary head; train mode must still run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.auxiliary = conv(3, 8), conv(8, 11), Head(11), Head(8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.head(self.body(x))
        return (y, self.auxiliary(x)) if self.training else y


@net("unused_layer", image(), prunable=(8,))
class UnusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.unused = conv(3, 8), Head(8), nn.Linear(8, 6)
        self.register_buffer("also_unused", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


@net("autocast_off", sequence(), prunable=(9, 13))
class AutocastOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.classifier = nn.Linear(6, 9), MLP(9, 13), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        with torch.autocast("cpu", enabled=False):
            x = x + self.mlp(x.float())
        return self.classifier(x)


@net("autocast_on", sequence(), prunable=(9, 13), tolerance=3e-2)
class AutocastOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.classifier = nn.Linear(6, 9), MLP(9, 13), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.mlp(x)
        return self.classifier(x + y.float())


@net("no_grad_region", sequence(), prunable=(9, 13))
class NoGradRegion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.classifier = nn.Linear(6, 9), MLP(9, 13), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.embed(x)
        return self.classifier(x + self.mlp(x))
