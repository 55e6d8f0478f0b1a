"""Small nets with residual paths of every shape, and what makes each branch's output zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nets import normal, seeded
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Case:
    """One net: `zeros` are the parameters by branch without which its output is zero."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    zeros: dict[str, tuple[str, ...]]


CASES: dict[str, Case] = {}


def case(
    name: str, inputs: Callable[[int], Tensor], **zeros: str
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a net; a keyword `a__b="c d"` says that c and d zero the branch "a.b"."""

    def register(make: type[nn.Module]) -> type[nn.Module]:
        layers = {k.replace("__", "."): v for k, v in zeros.items()}
        CASES[name] = Case(lambda: seeded(make, 0), inputs, _parameters(make(), layers))
        return make

    return register


def _parameters(model: nn.Module, layers: dict[str, str]) -> dict[str, tuple[str, ...]]:
    names = [n for n, _ in model.named_parameters()]
    return {
        branch: tuple(n for n in names for layer in text.split() if f"{n}.".startswith(layer + "."))
        for branch, text in layers.items()
    }


def rows(batch: int) -> Tensor:
    return normal(batch, 12)


def words(batch: int) -> Tensor:
    return normal(batch, 5, 12)


def pictures(batch: int) -> Tensor:
    return normal(batch, 3, 8, 8)


def mlp(size: int = 12, hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))


class Attention(nn.Module):
    def __init__(self, size: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))


class DropPath(nn.Module):
    """Stochastic depth: a capture in eval mode shows nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], *[1] * (x.ndim - 1)) < 0.5)


@case("own_class", rows, blocks__0__body="blocks.0.body.2", blocks__1__body="blocks.1.body.2")
class OwnClass(nn.Module):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 4)
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


@case("in_parent", rows, layers__0="layers.0.2", layers__1="layers.1.2", layers__2="layers.2.2")
class InParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 4)
        self.layers = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            y = layer(x)
            y += x
            x = y
        return self.head(x)


class PreNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(12), Attention()
        self.norm2, self.mlp = nn.LayerNorm(12), mlp()
        self.gamma = nn.Parameter(torch.full((12,), 0.7))
        self.drop, self.path = nn.Dropout(0.1), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.gamma * self.drop(self.attn(self.norm1(x))))
        return x + self.path(self.mlp(self.norm2(x)))


@case(
    "pre_norm", words,
    blocks__0__attn="blocks.0.gamma", blocks__0__mlp="blocks.0.mlp.2",
    blocks__1__attn="blocks.1.gamma", blocks__1__mlp="blocks.1.mlp.2",
)  # fmt: skip
class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 4)
        self.blocks = nn.ModuleList(PreNormBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@case("post_norm", words, block__attn="block.attn.proj", block__mlp="block.mlp.2")
class PostNorm(nn.Module):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attn = nn.LayerNorm(12), Attention()
            self.norm2, self.mlp = nn.LayerNorm(12), mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(x + self.attn(x))
            return self.norm2(self.mlp(x) + x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(12, 12), self.Block(), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class BasicBlock(nn.Module):
    """As of a ResNet: everything that can be done in place is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


@case("resnet", pictures, layers__0="layers.0.bn2", layers__1="layers.1.bn2",
      layers__2="layers.2.bn2")  # fmt: skip
class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layers = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12), BasicBlock(12, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


@case("pre_activation", pictures, conv="conv")
class PreActivation(nn.Module):
    """The first thing the branch does changes the stream, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = x + self.conv(self.relu(x.transpose(2, 3)))
        return self.head(out.mean((2, 3)))


@case("parallel", rows, a="a.2", b="b.2")
class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 4)
        self.a, self.b = mlp(), mlp(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.a(x) + self.b(self.norm(x)))


@case("branches_first", rows, a="block.a.2", b="block.b.2")
class BranchesFirst(nn.Module):
    """The branches are added to each other before they are added to the stream."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(12), mlp(), mlp(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.a(y) + self.b(y) + x

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(12, 12), self.Block(), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


CASES["branches_first"] = Case(
    CASES["branches_first"].build,
    rows,
    {f"block.{n}": p for n, p in CASES["branches_first"].zeros.items()},
)


@case("tuples", words, layer__mix="layer.mix.proj")
class Tuples(nn.Module):
    """The layer also returns, and takes, what is not its stream."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.scale = Attention(), nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            y = self.mix(x * self.scale + extra["bias"])
            return x + y, y

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(12, 12), self.Layer(), nn.Linear(12, 4)
        self.bias = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x), {"bias": self.bias})[0])


class Nested(nn.Module):
    """A long way around, with short ones in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 4)
        self.down, self.inner, self.up = nn.Linear(12, 16), mlp(16, 8), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(x).relu()
        y = y + self.inner(y)
        return self.head(x + self.up(y))


class Shared(nn.Module):
    """One layer, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(12, 12), mlp(), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.layer(x)
        return self.head(x)


class Leaking(nn.Module):
    """Of each branch something else is returned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 4)
        self.a, self.b = mlp(), mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        added = self.a(x)
        y = x + added
        hidden = self.b[:2](y)
        return self.head(y + self.b[2](hidden)), added.sum(1), hidden.sum(1)


class NoStream(nn.Module):
    """Sums, but no stream: equal siblings, an embedding of positions, a broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.position = nn.Parameter(torch.ones(5, 12))
        self.gate = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.b(x) + self.position
        return self.head(x + self.gate(x))


def interpreted(
    program: Any, held: dict[str, Tensor], model: nn.Module, branches: Any
) -> list[Tensor]:
    """Outputs of the captured graph, node by node, with zeros for what these branches add."""
    summands = {b.operand for b in branches}
    buffers = {
        n: b.clone() for n, b in {**dict(model.named_buffers()), **program.constants}.items()
    }
    env: dict[Any, Any] = {}
    given = iter(tree_leaves((program.args, program.kwargs)))
    for node in program.graph.graph.nodes:
        if node.op == "output":
            return [env[n] for n in node.args[0]]
        if node.op == "placeholder":
            name = program.tensors.get(node)
            env[node] = next(given) if name is None else held.get(name, buffers.get(name))
        else:
            args = fx.map_arg(node.args, lambda n: env[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
            env[node] = node.target(*args, **kwargs)
        if node in summands:
            env[node] = torch.zeros_like(env[node])
    raise AssertionError("no output")
