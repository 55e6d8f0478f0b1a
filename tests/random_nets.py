"""Random nets: blocks drawn at random depth and width, each total, whatever reaches it.

A net is a tuple of block specifications. Their repr is Python, so that a counter-example can be
pasted into a test as it was printed:

    RandomNet((Conv(6), Residual((Grouped(2, 3),)), Shuffle(3)), (Hidden(7),), flatten=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from math import gcd
from typing import Any

import torch
from hypothesis import strategies as st
from nets import FusedQKV, GroupedQuery, SeparateQKV, SqueezeExcite, normal, randomise, shuffle
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
MOST_CHANNELS = 24
MOST_PLACES = 8


@dataclass(frozen=True)
class Block:
    """A specification: `build` makes a module for inputs of any shape of its kind."""

    def build(self, shape: torch.Size) -> nn.Module:
        raise NotImplementedError

    @property
    def exact(self) -> bool:
        """Whether zeroing consumers says what removing does: no norm or product in between."""
        return all(block.exact for block in self.inner())

    def inner(self) -> Iterator[Block]:
        for field in fields(self):
            yield from blocks_in(getattr(self, field.name))

    def kinds(self) -> Iterator[str]:
        yield type(self).__name__
        for block in self.inner():
            yield from block.kinds()


def blocks_in(value: object) -> Iterator[Block]:
    if isinstance(value, Block):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from blocks_in(item)


# Convolutions -------------------------------------------------------------------------------------


def convolution(
    inputs: int, outputs: int, kernel: int = 1, groups: int = 1, act: str = "silu"
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[act](),
    )


@dataclass(frozen=True)
class Conv(Block):
    width: int
    kernel: int = 1
    act: str = "silu"

    def build(self, shape: torch.Size) -> nn.Module:
        return convolution(shape[1], self.width, self.kernel, act=self.act)


@dataclass(frozen=True)
class Grouped(Block):
    groups: int
    width: int
    act: str = "relu"

    def build(self, shape: torch.Size) -> nn.Module:
        groups = gcd(self.groups, shape[1])
        return convolution(shape[1], groups * self.width, 3, groups, self.act)


@dataclass(frozen=True)
class Depthwise(Block):
    multiplier: int = 1

    def build(self, shape: torch.Size) -> nn.Module:
        return convolution(shape[1], shape[1] * self.multiplier, 3, shape[1])


@dataclass(frozen=True)
class Deconv(Block):
    width: int
    groups: int = 1

    def build(self, shape: torch.Size) -> nn.Module:
        groups = gcd(self.groups, shape[1])
        grow = nn.ConvTranspose2d(shape[1], groups * self.width, 3, padding=1, groups=groups)
        norm = nn.InstanceNorm2d if shape[2] > 1 else nn.BatchNorm2d
        return nn.Sequential(grow, norm(groups * self.width, affine=True))


@dataclass(frozen=True)
class Shared(Block):
    """One module applied several times in a row."""

    times: int

    def build(self, shape: torch.Size) -> nn.Module:
        block = convolution(shape[1], shape[1], 3)
        return nn.Sequential(*[block] * self.times)


# Blocks around blocks -----------------------------------------------------------------------------


class Chain(nn.Sequential):
    """Blocks in a row, each built for what the one before it makes."""

    def __init__(self, blocks: tuple[Block, ...], shape: torch.Size) -> None:
        made: list[nn.Module] = []
        x = torch.zeros(shape)
        for block in blocks:
            module = block.build(x.shape).eval()
            x = module(x).detach()
            made.append(module)
            if x.dim() == 4 and x.shape[1] > MOST_CHANNELS:
                made.append(convolution(x.shape[1], MOST_CHANNELS // 3))
                x = x[:, : MOST_CHANNELS // 3]
        super().__init__(*made)
        self.shape = x.shape


class Joined(nn.Module):
    """Several branches over one input, brought to its height and width, then combined."""

    def __init__(
        self, branches: tuple[tuple[Block, ...], ...], shape: torch.Size, combine: str
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Chain(blocks, shape) for blocks in branches)
        self.combine = combine
        self.project = nn.ModuleList(
            nn.Identity()
            if combine == "concat" or branch.shape[1] == shape[1]
            else convolution(branch.shape[1], shape[1])
            for branch in self.branches
        )

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for branch, project in zip(self.branches, self.project, strict=True):
            y = project(branch(x))
            if y.shape[2] != x.shape[2]:
                y = F.adaptive_avg_pool2d(y, (x.shape[2], x.shape[3]))
            made.append(y)
        if self.combine == "concat":
            return torch.cat([*made, x], 1)
        return x + sum(made) if self.combine == "add" else x * torch.stack(made).sum(0).sigmoid()


@dataclass(frozen=True)
class Residual(Block):
    body: tuple[Block, ...]

    def build(self, shape: torch.Size) -> nn.Module:
        return Joined((self.body,), shape, "add")


@dataclass(frozen=True)
class Branches(Block):
    branches: tuple[tuple[Block, ...], ...]
    combine: str

    def build(self, shape: torch.Size) -> nn.Module:
        return Joined(self.branches, shape, self.combine)


class Growing(nn.Module):
    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            convolution(width + i * growth, growth, 3) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps[::-1], 1)


@dataclass(frozen=True)
class Dense(Block):
    growth: int
    layers: int

    def build(self, shape: torch.Size) -> nn.Module:
        return Growing(shape[1], self.growth, self.layers)


class Linked(nn.Module):
    def __init__(self, inputs: int, width: int, links: int, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.enter = convolution(inputs, 2 * width)
        self.links = nn.ModuleList(convolution(width, width, 3) for _ in range(links))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for link in self.links:
            y = link(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class ChunkChain(Block):
    width: int
    links: int
    shortcut: bool

    def build(self, shape: torch.Size) -> nn.Module:
        return Linked(shape[1], self.width, self.links, self.shortcut)


# Blocks that move channels ------------------------------------------------------------------------


class Rearranged(nn.Module):
    """One function of a map, with its sizes as attributes of the module."""

    def __init__(self, function: Callable[..., Tensor], **sizes: int) -> None:
        super().__init__()
        self.function, self.names = function, tuple(sizes)
        for name, size in sizes.items():
            setattr(self, name, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **{name: getattr(self, name) for name in self.names})


def divisible(inputs: int, parts: int) -> tuple[int, nn.Module]:
    """The next width that `parts` divides, and what brings a map to it."""
    width = -(-inputs // parts) * parts
    return width, nn.Identity() if width == inputs else convolution(inputs, width)


@dataclass(frozen=True)
class Shuffle(Block):
    groups: int
    times: int = 1

    def build(self, shape: torch.Size) -> nn.Module:
        _, fit = divisible(shape[1], self.groups)
        return nn.Sequential(fit, *[Rearranged(shuffle, groups=self.groups)] * self.times)


def rotated(x: Tensor, parts: int) -> Tensor:
    pieces = x.chunk(parts, 1)
    return x + torch.cat([*pieces[1:], pieces[0]], 1).sigmoid()


@dataclass(frozen=True)
class Rotate(Block):
    parts: int

    def build(self, shape: torch.Size) -> nn.Module:
        _, fit = divisible(shape[1], self.parts)
        return nn.Sequential(fit, Rearranged(rotated, parts=self.parts))


class Parted(nn.Module):
    """The first channels through one block, the rest through another or past it."""

    def __init__(self, inputs: int, first: int, width: int, both: bool) -> None:
        super().__init__()
        self.first, self.rest = first, inputs - first
        self.left = convolution(first, width, 3)
        self.right = convolution(inputs - first, width) if both else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([self.first, self.rest], 1)
        return torch.cat([self.right(b), self.left(a)], 1)


class Sliced(Parted):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, : self.first]), self.right(x[:, self.first :])], 1)


@dataclass(frozen=True)
class Split(Block):
    share: float
    width: int
    both: bool
    slices: bool

    def build(self, shape: torch.Size) -> nn.Module:
        width, fit = divisible(shape[1], 2)
        first = min(max(1, round(width * self.share)), width - 1)
        kind = Sliced if self.slices else Parted
        return nn.Sequential(fit, kind(width, first, self.width, self.both))


class HalvesThroughOne(nn.Module):
    def __init__(self, half: int, width: int) -> None:
        super().__init__()
        self.shared = convolution(half, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([self.shared(b), self.shared(a)], 1)


@dataclass(frozen=True)
class SplitShared(Block):
    width: int

    def build(self, shape: torch.Size) -> nn.Module:
        width, fit = divisible(shape[1], 2)
        return nn.Sequential(fit, HalvesThroughOne(width // 2, self.width))


def repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat(1, times, 1, 1)


def interleaved(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, 1)


def turned(x: Tensor, parts: int) -> Tensor:
    """Channels as a matrix and back, by way of other layouts; nothing moves."""
    y = x.unflatten(1, (parts, -1)).permute(0, 2, 1, 3, 4).contiguous()
    y = y.flatten(3).transpose(1, 2)
    return y.reshape(x.shape)


@dataclass(frozen=True)
class View(Block):
    how: str
    parts: int

    def build(self, shape: torch.Size) -> nn.Module:
        if self.how == "turned":
            _, fit = divisible(shape[1], self.parts)
            return nn.Sequential(fit, Rearranged(turned, parts=self.parts))
        function = repeated if self.how == "repeated" else interleaved
        return Rearranged(function, times=self.parts)


def rolled(x: Tensor, shift: int) -> Tensor:
    return torch.roll(x, shift, 1)


def flipped(x: Tensor) -> Tensor:
    return x.flip(1)


def merged(x: Tensor, parts: int) -> Tensor:
    """Pieces interleaved by stacking them."""
    return torch.stack(x.chunk(parts, 1), 2).flatten(1, 2)


def unmixed(x: Tensor) -> Tensor:
    """Even channels first, then odd ones."""
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


def pixels(x: Tensor) -> Tensor:
    """Positions among the channels, in another order than before."""
    return F.pixel_shuffle(x.repeat(1, 2, 1, 1).repeat_interleave(2, 1), 2)[..., ::2, ::2]


@dataclass(frozen=True)
class Reorder(Block):
    how: str
    number: int

    def build(self, shape: torch.Size) -> nn.Module:
        if self.how == "rolled":
            return Rearranged(rolled, shift=self.number)
        if self.how == "merged":
            _, fit = divisible(shape[1], self.number)
            return nn.Sequential(fit, Rearranged(merged, parts=self.number))
        if self.how == "unmixed":
            _, fit = divisible(shape[1], 2)
            return nn.Sequential(fit, Rearranged(unmixed))
        return Rearranged(flipped if self.how == "flipped" else pixels)


class HalfUnit(nn.Module):
    """One half through convolutions and past them, then both interleaved (ShuffleNet V2)."""

    def __init__(self, half: int, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.body = nn.Sequential(convolution(half, width), convolution(width, half, 3))

    def forward(self, x: Tensor) -> Tensor:
        past, through = x.chunk(2, 1)
        if self.first:
            past, through = through, past
        return shuffle(torch.cat([past, self.body(through)], 1), 2)


@dataclass(frozen=True)
class HalfUnits(Block):
    width: int
    times: int
    first: bool

    def build(self, shape: torch.Size) -> nn.Module:
        width, fit = divisible(shape[1], 4)
        units = [HalfUnit(width // 2, self.width, self.first) for _ in range(self.times)]
        return nn.Sequential(fit, *units)


class PadShortcutModule(nn.Module):
    def __init__(self, width: int, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.body = convolution(width, width + 2 * extra, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + F.pad(x, (0, 0, 0, 0, self.extra, self.extra))


@dataclass(frozen=True)
class PadShortcut(Block):
    extra: int

    def build(self, shape: torch.Size) -> nn.Module:
        return PadShortcutModule(shape[1], self.extra)


# Gates and norms ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Excite(Block):
    hidden: int

    def build(self, shape: torch.Size) -> nn.Module:
        return SqueezeExcite(shape[1], self.hidden)


class Masked(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask = nn.Conv2d(width, 1, 1)
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x).sigmoid() * self.scale


@dataclass(frozen=True)
class Mask(Block):
    def build(self, shape: torch.Size) -> nn.Module:
        return Masked(shape[1])


@dataclass(frozen=True)
class GatedConv(Block):
    width: int

    def build(self, shape: torch.Size) -> nn.Module:
        return nn.Sequential(nn.Conv2d(shape[1], 2 * self.width, 1), nn.GLU(1))


class ChannelsLast(nn.Module):
    def __init__(self, width: int, hidden: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PointwiseMLP(Block):
    hidden: int
    norm: bool

    @property
    def exact(self) -> bool:
        return not self.norm

    def build(self, shape: torch.Size) -> nn.Module:
        return ChannelsLast(shape[1], self.hidden, self.norm)


class Attending(nn.Module):
    """Places as tokens, attention as a residual branch, tokens as places again."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.enter, self.leave = convolution(width, 10), convolution(10, width)
        self.attention = {
            "fused": FusedQKV,
            "separate": SeparateQKV,
            "expand": lambda: GroupedQuery("expand"),
            "repeat": lambda: GroupedQuery("repeat_interleave"),
            "sdpa": lambda: GroupedQuery("sdpa"),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        tokens = y.flatten(2).transpose(1, 2)
        y = y + self.attention(tokens).transpose(1, 2).reshape(y.shape)
        return x + self.leave(y)


@dataclass(frozen=True)
class Attention(Block):
    kind: str

    @property
    def exact(self) -> bool:
        return False

    def build(self, shape: torch.Size) -> nn.Module:
        return Attending(shape[1], self.kind)


# Places -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool(Block):
    how: str

    def build(self, shape: torch.Size) -> nn.Module:
        if shape[2] < 2:
            return nn.Identity()
        return nn.MaxPool2d(2) if self.how == "max" else nn.AvgPool2d(2)


@dataclass(frozen=True)
class Upsample(Block):
    how: str

    def build(self, shape: torch.Size) -> nn.Module:
        if 2 * shape[2] > MOST_PLACES:
            return nn.Identity()
        return nn.Upsample(scale_factor=2, mode=self.how)


@dataclass(frozen=True)
class PixelShuffle(Block):
    width: int

    def build(self, shape: torch.Size) -> nn.Module:
        grow = nn.Sequential(nn.Conv2d(shape[1], 4 * self.width, 1), nn.PixelShuffle(2))
        return grow if 2 * shape[2] <= MOST_PLACES else nn.Sequential(nn.AvgPool2d(2), *grow)


@dataclass(frozen=True)
class PixelUnshuffle(Block):
    def build(self, shape: torch.Size) -> nn.Module:
        return nn.Identity() if shape[2] % 2 else nn.PixelUnshuffle(2)


# Vectors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hidden(Block):
    width: int
    act: str = "sigmoid"

    def build(self, shape: torch.Size) -> nn.Module:
        return nn.Sequential(
            nn.Linear(shape[1], self.width), nn.BatchNorm1d(self.width), ACTIVATIONS[self.act]()
        )


class VectorMLP(nn.Module):
    def __init__(self, width: int, hidden: int, gated: bool, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.gated = gated
        self.up = nn.Linear(width, 2 * hidden if gated else hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        if self.gated:
            gate, value = y.chunk(2, -1)
            y = F.silu(gate) * value
        return x + self.down(y.sigmoid())


@dataclass(frozen=True)
class ResidualMLP(Block):
    hidden: int
    gated: bool
    norm: bool

    @property
    def exact(self) -> bool:
        return not self.norm

    def build(self, shape: torch.Size) -> nn.Module:
        return VectorMLP(shape[1], self.hidden, self.gated, self.norm)


# The whole net ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, blocks: tuple[Block, ...], hidden: tuple[Block, ...], flatten: bool) -> None:
        super().__init__()
        self.stem = convolution(3, 6, 3)
        self.body = Chain(blocks, torch.Size((2, 6, 4, 4)))
        self.flatten = flatten
        _, channels, height, width = self.body.shape
        features = channels * height * width if flatten else channels
        self.hidden = Chain(hidden, torch.Size((2, features)))
        self.classifier = nn.Linear(self.hidden.shape[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        x = x.flatten(1) if self.flatten else x.mean((2, 3))
        return self.classifier(self.hidden(x))


@dataclass(frozen=True)
class RandomNet:
    """A specification of a whole net: map blocks, then a flattening or pooling, then vectors."""

    blocks: tuple[Block, ...] = ()
    hidden: tuple[Block, ...] = ()
    flatten: bool = False

    @property
    def exact(self) -> bool:
        return all(block.exact for block in (*self.blocks, *self.hidden))

    def kinds(self) -> Iterator[str]:
        for block in (*self.blocks, *self.hidden):
            yield from block.kinds()

    def build(self) -> nn.Module:
        """The module, in eval mode and in double precision, the same one every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return randomise(Net(self.blocks, self.hidden, self.flatten)).double().eval()

    def inputs(self, batch: int) -> Tensor:
        return normal(batch, 3, 4, 4).double()


# Strategies ---------------------------------------------------------------------------------------


def some(kind: type[Block], /, **fields: Any) -> st.SearchStrategy[Block]:
    return st.builds(kind, **fields)


WIDTH = st.integers(2, 8)
FEW = st.integers(2, 3)
ACTIVATION = st.sampled_from(sorted(ACTIVATIONS))

LEAVES = st.one_of(
    some(Conv, width=WIDTH, kernel=st.sampled_from([1, 3]), act=ACTIVATION),
    some(Grouped, groups=FEW, width=FEW, act=ACTIVATION),
    some(Depthwise, multiplier=st.integers(1, 2)),
    some(Deconv, width=FEW, groups=st.integers(1, 3)),
    some(Shared, times=FEW),
    some(Dense, growth=FEW, layers=FEW),
    some(ChunkChain, width=FEW, links=st.integers(1, 2), shortcut=st.booleans()),
    some(Shuffle, groups=FEW, times=st.integers(1, 2)),
    some(Rotate, parts=FEW),
    some(Reorder, how=st.sampled_from(["rolled", "flipped", "merged", "unmixed", "pixels"]),
         number=FEW),
    some(HalfUnits, width=WIDTH, times=st.integers(1, 4), first=st.booleans()),
    some(Split, share=st.sampled_from([0.25, 0.5, 0.7]), width=WIDTH, both=st.booleans(),
         slices=st.booleans()),
    some(SplitShared, width=WIDTH),
    some(View, how=st.sampled_from(["turned", "repeated", "interleaved"]), parts=FEW),
    some(PadShortcut, extra=st.integers(1, 3)),
    some(Excite, hidden=FEW),
    some(Mask),
    some(GatedConv, width=WIDTH),
    some(PointwiseMLP, hidden=WIDTH, norm=st.booleans()),
    some(Attention, kind=st.sampled_from(["fused", "separate", "expand", "repeat", "sdpa"])),
    some(Pool, how=st.sampled_from(["max", "average"])),
    some(Upsample, how=st.sampled_from(["nearest", "bilinear"])),
    some(PixelShuffle, width=FEW),
    some(PixelUnshuffle),
)  # fmt: skip


def composed(blocks: st.SearchStrategy[Block]) -> st.SearchStrategy[Block]:
    """Residuals, and branches that are joined, added or multiplied."""
    chain = st.lists(blocks, min_size=1, max_size=2).map(tuple)
    return st.one_of(
        some(Residual, body=chain),
        some(
            Branches,
            branches=st.lists(chain, min_size=1, max_size=2).map(tuple),
            combine=st.sampled_from(["concat", "add", "multiply"]),
        ),
    )


NESTED = composed(st.recursive(LEAVES, composed, max_leaves=4))
BLOCKS = st.integers(0, 3).flatmap(lambda draw: LEAVES if draw < 3 else NESTED)
VECTORS = st.one_of(
    some(Hidden, width=WIDTH, act=ACTIVATION),
    some(ResidualMLP, hidden=WIDTH, gated=st.booleans(), norm=st.booleans()),
)


def random_nets() -> st.SearchStrategy[RandomNet]:
    return st.builds(
        RandomNet,
        blocks=st.lists(BLOCKS, min_size=1, max_size=6).map(tuple),
        hidden=st.lists(VECTORS, max_size=2).map(tuple),
        flatten=st.booleans(),
    )
