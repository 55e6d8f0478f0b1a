"""Sites of matrix products and Einstein sums with a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters

import torch
from torch import fx

from depcut import axes
from depcut.calibration.site import Call, Place, Site


@dataclass(frozen=True)
class Product:
    """x W^T, W a matrix that may be stored transposed.

    Attributes:
        source: Argument that holds the activations.
        features: Its contracted dimension, from the end.
        weight: Argument that holds the matrix.
        dim: Its contracted dimension.
    """

    source: str
    features: int
    weight: str
    dim: int

    @property
    def result(self) -> int:
        """Where the vectors of the result lie."""
        return self.features

    def inputs(self, call: Call) -> torch.Tensor:
        """Every vector of features, whatever dimensions lead to it."""
        x: torch.Tensor = call[self.source]
        return x.movedim(self.features, -1).reshape(1, -1, x.shape[self.features])

    def matrix(self, call: Call) -> torch.Tensor:
        """The parameter with its contracted dimension last."""
        weight: torch.Tensor = call[self.weight]
        return weight.movedim(self.dim, -1)[None]

    def write(self, call: Call, matrix: torch.Tensor) -> None:
        """Turned back."""
        call[self.weight].movedim(self.dim, -1).copy_(matrix[0])


def linear(place: Place) -> list[Site]:
    """y = x W^T + b."""
    return _site(place, "input", -1, ("weight", 1), place.biases(place.arg("bias")))


def matmul(place: Place) -> list[Site]:
    """x @ W or W @ x, with or without a vector added."""
    added = "self" if len([n for n in place.node.args if isinstance(n, fx.Node)]) > 2 else ""
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}
    kind = str(place.node.target).split(".")[1].removesuffix("_")
    left, right = names.get(kind, ("self", "mat2" if place.has("mat2") else "other"))
    if not (place.has(left) and place.has(right)):
        return []
    biases: tuple[str, ...] | None = ()
    if added:
        plain = all(place.arg(k) == 1 for k in ("beta", "alpha") if place.has(k))
        biases = place.biases(place.arg("self")) if plain else None
    sites = _site(place, left, -1, (right, 0), biases)
    # A vector that is added there runs along the columns of the result, not along its features.
    return sites or _site(place, right, -2, (left, 1), None if added else ())


def _site(
    place: Place,
    source: str,
    features: int,
    weight: tuple[str, int],
    biases: tuple[str, ...] | None,
) -> list[Site]:
    found = place.matrix(place.arg(weight[0]), weight[1])
    if found is None or biases is None or len(place.dims(source)) < 2:
        return []
    name, dim = found
    dims = place.coupling.dims[name]
    family = Product(source, features, *weight)
    return [Site(place.node, (name,), biases, ((dims[dim],),), dims[1 - dim], family)]


@dataclass(frozen=True)
class Einsum:
    """An Einstein sum of a parameter and one other operand.

    Attributes:
        which: Position of the parameter among the operands.
        given: Labels of the other operand.
        held: Labels of the parameter.
        blocks: Labels that both and the result have.
        free: Labels that only the other operand and the result have.
        summed: Labels that both have and the result has not.
        made: Labels that only the parameter and the result have.
    """

    which: int
    given: str
    held: str
    blocks: str
    free: str
    summed: str
    made: str

    @property
    def result(self) -> None:
        """The result's labels may lie anywhere."""

    def inputs(self, call: Call) -> torch.Tensor:
        """Blocks first, summed labels last."""
        x = call["tensors"][1 - self.which]
        x = torch.einsum(f"{self.given}->{self.blocks}{self.free}{self.summed}", x)
        ends = len(self.blocks), x.ndim - len(self.summed)
        sizes = x.shape[: ends[0]].numel(), x.shape[ends[0] : ends[1]].numel()
        return x.reshape(*sizes, x.shape[ends[1] :].numel())

    def _turned(self, call: Call) -> torch.Tensor:
        """The parameter's labels in the order blocks, made, summed."""
        order = self.blocks + self.made + self.summed
        weight: torch.Tensor = call["tensors"][self.which]
        return weight.permute([self.held.index(c) for c in order])

    def matrix(self, call: Call) -> torch.Tensor:
        """Blocks, made and summed labels flattened each."""
        w = self._turned(call)
        ends = len(self.blocks), len(self.blocks) + len(self.made)
        sizes = w.shape[: ends[0]].numel(), w.shape[ends[0] : ends[1]].numel()
        return w.reshape(*sizes, w.shape[ends[1] :].numel())

    def write(self, call: Call, matrix: torch.Tensor) -> None:
        """Turned back."""
        turned = self._turned(call)
        turned.copy_(matrix.reshape(turned.shape))


def _spelled(place: Place) -> str:
    """The equation with letters in place of dots, the same from the right for all operands."""
    equation: str = place.arg("equation").replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    free = [c for c in ascii_letters if c not in equation]
    specs, most = inputs.split(","), 0
    for i, spec in enumerate(specs):
        if "..." in spec:
            count = len(place.dims(place.arg("tensors")[i])) - len(spec.replace("...", ""))
            specs[i] = spec.replace("...", "".join(free[:count][::-1]))
            most = max(most, count)
    return ",".join(specs) + arrow + output.replace("...", "".join(free[:most][::-1]))


def einsum(place: Place) -> list[Site]:
    """A sum over labels that a parameter shares with activations."""
    operands = list(place.arg("tensors"))
    inputs, arrow, output = _spelled(place).partition("->")
    specs = inputs.split(",")
    names = [place.parameter(n) for n in operands]
    if len(operands) != 2 or not arrow or names.count(None) != 1:
        return []
    which = 0 if names[0] is not None else 1
    held, given, name = specs[which], specs[1 - which], names[which]
    assert name is not None
    made = "".join(c for c in held if c not in given)
    shared = [c for c in held if c in given]
    blocks = "".join(c for c in shared if c in output)
    summed = "".join(c for c in shared if c not in output)
    single = len(set(held)) == len(held) and len(set(given)) == len(given)
    free = "".join(c for c in given if c in output and c not in blocks)
    if not (single and summed and all(c in output for c in made)):
        return []
    terms = dict(zip(held, place.coupling.dims[name], strict=True))
    rows = axes.product(*(terms[c] for c in blocks + made))
    family = Einsum(which, given, held, blocks, free, summed, made)
    return [Site(place.node, (name,), (), (tuple(terms[c] for c in summed),), rows, family)]
