"""Ways in which Python code may be written around a typed width of 16 = 4 x 4."""

from __future__ import annotations

import contextlib
import functools
from abc import ABCMeta
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere


class Base(nn.Module):
    """Two linear layers around what a subclass does to [B, 16]; [B, 8] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def mixed(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.mixed(torch.tanh(self.a(x))))


def turned(h: Tensor, n: int = 4) -> Tensor:
    return h.view(len(h), 4, n).flip(1).reshape(len(h), 16)


class Plain(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)


class Inherited(Plain):
    """Nothing of its own: the patched method stands in the base class."""


class ZeroArgumentSuper(Plain):
    def mixed(self, h: Tensor) -> Tensor:
        h = super().mixed(h.reshape(len(h), 4, 4).reshape(len(h), 16))
        return h.view(-1, 16) * 2


class Private(Base):
    __factor = 3.0

    def __inner(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1) * self.__factor

    def mixed(self, h: Tensor) -> Tensor:
        return self.__inner(h).reshape(len(h), 16)


def logged(note: str) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.notes = (*getattr(self, "notes", ())[-2:], note)
            return function(self, *args, **kwargs)

        return wrapper

    return decorate


class Decorated(Base):
    @logged("outer")
    @logged("inner")
    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)


class Unwrapped(Base):
    """A decorator that is no functools.wraps one."""

    def twice(function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[misc]  # noqa: N805
        return lambda self, h: function(self, function(self, h))

    @twice
    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)


class WithoutGradients(Base):
    @torch.no_grad()
    def gate(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)

    def mixed(self, h: Tensor) -> Tensor:
        return h * self.gate(h)


@contextlib.contextmanager
def region() -> Iterator[None]:
    with torch.no_grad():
        yield


class ContextDecorated(Base):
    @region()
    def gate(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.gate(h)


class KeywordDefaults(Base):
    def mixed(self, h: Tensor, *, times: float = 2.0, flip: int = 1) -> Tensor:
        return h.view(len(h), 4, 4).flip(flip).reshape(len(h), 16) * times


class Helpers(Base):
    @staticmethod
    def cut(h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4)

    @classmethod
    def joined(cls, h: Tensor) -> Tensor:
        return cls.cut(h).flip(1).reshape(len(h), 16)

    def mixed(self, h: Tensor) -> Tensor:
        return self.joined(h)


class Property(Base):
    @property
    def scale(self) -> Tensor:
        return self.a.weight.view(4, 4, 8).sum((1, 2)).mean()

    @property
    def pieces(self) -> Tensor:
        return self.a.bias.view(4, 4).reshape(16)

    def mixed(self, h: Tensor) -> Tensor:
        return h * self.pieces


class HelperFunction(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return turned(h)


class OtherWithTheHelper(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return turned(turned(h))


class PartialHelper(Base):
    def __init__(self) -> None:
        super().__init__()
        self.turn = functools.partial(turned, n=4)

    def mixed(self, h: Tensor) -> Tensor:
        return self.turn(h)


class LocalName(Base):
    def mixed(self, h: Tensor) -> Tensor:
        function = {"turned": turned}.get("turned")
        return function(h)


class Processor:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, owner: nn.Module, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16) * self.factor


class Processed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor(2.0)

    def mixed(self, h: Tensor) -> Tensor:
        return self.processor(self, h)


class Helper:
    def __init__(self) -> None:
        self.factor = 3.0

    def compute(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16) * self.factor


class HelperObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()

    def mixed(self, h: Tensor) -> Tensor:
        return self.helper.compute(h)


class Lambda(Base):
    def mixed(self, h: Tensor) -> Tensor:
        cut = lambda t: t.view(len(t), 4, 4)  # noqa: E731
        return cut(h).flip(1).reshape(len(h), 16)


class SizesBuiltEarlier(Base):
    def mixed(self, h: Tensor) -> Tensor:
        shape = (len(h), 4, 4)
        flat = [len(h), 16]
        return h.view(shape).flip(1).reshape(*flat)


class SizesBuiltByAddition(Base):
    def mixed(self, h: Tensor) -> Tensor:
        shape = h.shape[:-1] + (4, 4)  # noqa: RUF005
        return h.view(*shape).flip(1).reshape(h.shape[:-1] + (16,))  # noqa: RUF005


class Comprehension(Base):
    def mixed(self, h: Tensor) -> Tensor:
        pieces = [h.view(len(h), 4, 4)[:, i] * (i + 1) for i in range(4)]
        return torch.cat(pieces, 1)


class Loop(Base):
    def mixed(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)
        return h


class Walrus(Base):
    def mixed(self, h: Tensor) -> Tensor:
        if (n := 4) > 2:
            h = h.view(len(h), n, 16 // n).flip(1).reshape(len(h), 16)
        return h


class Ternary(Base):
    def mixed(self, h: Tensor) -> Tensor:
        n = 4 if self.training else 2 * 2
        return h.view(len(h), 4, n).flip(1).reshape(len(h), 16)


class Keywords(Base):
    def mixed(self, h: Tensor) -> Tensor:
        options = {"dim": 1, "sizes": (4, 4)}
        return h.unflatten(**options).flip(1).flatten(1)


class Split(Base):
    def mixed(self, h: Tensor) -> Tensor:
        a, b = h.split(8, dim=1)
        c, d = torch.split(h, [8, 8], dim=1)
        return torch.cat([b * c, a * d], 1)


class Narrowed(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return torch.cat([h[:, 8:], h[:, :8] * 2], 1)


class Normed(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return F.normalize(h.view(len(h), 4, 4), dim=2).reshape(len(h), 16)


class Cached(Base):
    seen: ClassVar[dict[str, int]] = {}

    def mixed(self, h: Tensor) -> Tensor:
        type(self).seen["calls"] = 1
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)


class Meta(ABCMeta):
    """Counts the classes it makes."""

    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: Any, namespace: Any, **options: Any) -> Any:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace, **options)


class WithMeta(Base, metaclass=Meta):
    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)


class Registered(Base):
    """A subclass must say what it is called."""

    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind


class RegisteredNet(Registered, kind="net"):
    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)


class Slotted(Base):
    __slots__ = ()

    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)


def closed_over(factor: float, width: int = 16) -> type[nn.Module]:
    """A class whose method closes over locals."""

    def scaled(h: Tensor) -> Tensor:
        return h.reshape(len(h), 16) * factor

    class Closing(Base):
        def mixed(self, h: Tensor) -> Tensor:
            return scaled(h.view(len(h), 4, width // 4).flip(1)).view(len(h), width)

    return Closing


class SelfCall(Base):
    """Calls itself by its own name."""

    def mixed(self, h: Tensor, depth: int = 2) -> Tensor:
        h = h.view(len(h), 4, 4).flip(1).reshape(len(h), 16)
        return self.mixed(h, depth - 1) if depth else h


class AssignedForward(nn.Module):
    """Its forward is an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def run(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).view(len(x), 4, 4).flip(1).reshape(len(x), 16))

    forward = run


class Einsum(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return torch.einsum("bij,kij->bk", h.view(-1, 4, 4), self.b.weight.view(5, 4, 4))[:, :1] + h


class Expanded(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return h * torch.ones(1, device=h.device).expand(len(h), 16)


class Unicode(Base):
    """Columns count bytes."""

    def mixed(self, h: Tensor) -> Tensor:
        return {"äöü": h.view(len(h), 4, 4)}["äöü"].flip(1).reshape(len(h), 16)


class MultiLine(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return h.view(
            len(h),
            2 * 2,
            4,  # the size of a head
        ).reshape(
            len(h),
            16,
        )


class GlobalConstant(Base):
    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), PARTS, PARTS).flip(1).reshape(len(h), PARTS * PARTS)


PARTS = 4


class ClassConstant(Base):
    PARTS = 4

    def mixed(self, h: Tensor) -> Tensor:
        return h.view(len(h), self.PARTS, self.PARTS).flip(1).reshape(len(h), self.PARTS**2)


FORMS: tuple[type[nn.Module], ...] = tuple(
    kind
    for kind in vars().copy().values()
    if isinstance(kind, type)
    and issubclass(kind, nn.Module)
    and kind not in (nn.Module, Base, Registered, RegisteredNet)
)
