"""Which expression of the code supplies a number that a call of torch got."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from depcut.capture.calls import Frame, TorchCall
from depcut.rewrite.places import is_typed, place_of

Tensor = torch.Tensor


def call(
    code: str, function: Callable[..., Any], positional: int = 0, left: bool | None = None
) -> TorchCall:
    """A call as the capture records it, from the line of code that makes it."""
    statement = ast.parse(code).body[0]
    node = statement.value if isinstance(statement, ast.Expr) else statement
    frame = Frame(call.__code__, node)
    return TorchCall(function, "", (frame,), positional=positional, left=left)


# Code, what is called, how many arguments come by position, which side, where the number stands;
# then the expression, and where the number stands in it.
SIZE = "split_size_or_sections"
FOUND = {
    "by position": ("torch.reshape(x, (2, n))", torch.reshape, 2, None, (1, 1), "n", ()),
    "a method": ("x.reshape(2, n)", Tensor.reshape, 3, None, (2,), "n", ()),
    "a list": ("x.view([2, n])", Tensor.view, 2, None, (1, 1), "n", ()),
    "a starred item": ("x.view(*sizes, n)", Tensor.view, 4, None, (3,), "n", ()),
    "in a starred item": ("x.view(2, *sizes)", Tensor.view, 4, None, (3,), "sizes", (1,)),
    "in a starred list": ("x.view((*sizes, n))", Tensor.view, 2, None, (1, 1), "(*sizes, n)", (1,)),
    "before a star": ("x.view(n, *sizes)", Tensor.view, 4, None, (1,), "n", ()),
    "a name": ("x.view(sizes)", Tensor.view, 2, None, (1, 1), "sizes", (1,)),
    "a keyword": ("torch.split(x, split_size_or_sections=n)", torch.split, 1, None, (1,), "n", ()),
    "keywords": ("torch.split(x, **given)", torch.split, 1, None, (1,), "given", (SIZE,)),
    "beside keywords": ("torch.split(x, n, **given)", torch.split, 2, None, (1,), "n", ()),
    "unbound": ("torch.Tensor.view(x, 2, n)", Tensor.view, 3, None, (2,), "n", ()),
    "functional": ("F.pad(x, (0, n))", functional.pad, 2, None, (1, 1), "n", ()),
    "an operator": ("x / n", Tensor.div, 2, False, (1,), "n", ()),
    "its left side": ("n * x", Tensor.mul, 2, True, (1,), "n", ()),
    "in place": ("x *= n", Tensor.mul_, 2, None, (1,), "n", ()),
    "a comparison": ("x > n", Tensor.gt, 2, False, (1,), "n", ()),
    "its other side": ("n > x", Tensor.lt, 2, True, (1,), "n", ()),
    "an index": ("x[n]", Tensor.__getitem__, 2, None, (1,), "n", ()),
    "a bound": ("x[:, :n]", Tensor.__getitem__, 2, None, (1, 1, "stop"), "n", ()),
    "a step": ("x[::n]", Tensor.__getitem__, 2, None, (1, "step"), "n", ()),
}  # fmt: skip

NOWHERE = {
    "an operator seen from no side": ("x / n", Tensor.div, 2, None, (1,)),
    "the left side in place": ("x *= n", Tensor.mul_, 2, None, (0,)),
    "several mappings": ("torch.split(x, **a, **b)", torch.split, 1, None, (1,)),
    "an unknown keyword": ("torch.add(x, y)", torch.add, 2, None, ("alpha",)),
    "between two stars": ("x.view(*a, n, *b)", Tensor.view, 6, None, (3,)),
    "an index behind a star": ("x[(*a, n)]", Tensor.__getitem__, 2, None, (1, 1)),
    "a bound that is left out": ("x[n:]", Tensor.__getitem__, 2, None, (1, "stop")),
    "a bound of a name": ("x[window]", Tensor.__getitem__, 2, None, (1, "stop")),
    "another expression": ("x.n", Tensor.view, 2, None, (1,)),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_expression_that_gives_a_number(case: str) -> None:
    code, function, positional, left, steps, expression, inside = FOUND[case]
    place = place_of(call(code, function, positional, left), steps)
    assert place is not None
    assert (ast.unparse(place.node), place.steps) == (expression, inside)


@pytest.mark.parametrize("case", NOWHERE)
def test_where_no_expression_can_be_told(case: str) -> None:
    code, function, positional, left, steps = NOWHERE[case]
    assert place_of(call(code, function, positional, left), steps) is None


def test_a_frame_without_code_has_no_place() -> None:
    recorded = TorchCall(Tensor.view, "", (Frame(call.__code__, None),), positional=2)
    assert place_of(recorded, (1,)) is None


@pytest.mark.parametrize(
    ("expression", "typed"),
    [
        ("16", True),
        ("-2.5", True),
        ("self.heads * 4", True),
        ("once", True),
        ("twice", False),
        ("unpacked", False),
        ("circular", False),
        ("x.shape[1]", False),
        ("other.heads", False),
        ("'name'", False),
        ("unknown", False),
    ],
)
def test_numbers_that_no_input_decides(expression: str, typed: bool) -> None:
    code = """
def forward(self, x, other):
    once = self.width // 2
    twice = 1
    twice = x.shape[0]
    unpacked, _ = x.shape
    circular = circular + 1
"""
    function = ast.parse(code).body[0]
    assert isinstance(function, ast.FunctionDef)
    node = ast.parse(expression, mode="eval").body
    assert is_typed(node, function) is typed
