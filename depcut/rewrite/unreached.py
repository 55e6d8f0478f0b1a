"""Lines of a patched function that no example call ran, and that name a number it replaces."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

from depcut.rewrite.functions import Source, Span

Position = tuple[int, int, int, int]


def unreached_numbers(
    source: Source, ran: Collection[Position], numbers: Collection[float]
) -> Iterator[tuple[Span, int]]:
    """Where branches that no example call took name a number that is another one elsewhere.

    What the number should be there is not known: such a place is to raise when it is reached.

    Args:
        source: Of the function.
        ran: Positions in the file of the expressions that called torch.
        numbers: Dense values of the numbers that are exchanged in the function.

    Yields:
        The position of the number in the function, and the number.
    """
    lines = {line for first, _, last, _ in ran for line in range(first, last + 1)}
    for branch in _branches(source.tree):
        if any(_runs(statement, lines) for statement in branch):
            continue
        for statement in branch:
            for call in ast.walk(statement):
                for constant in _given(call):
                    if type(constant.value) is int and constant.value in numbers:
                        yield source.span(constant), constant.value


def _runs(statement: ast.stmt, lines: Collection[int]) -> bool:
    last = statement.end_lineno or statement.lineno
    return any(line in lines for line in range(statement.lineno, last + 1))


def _branches(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Bodies that are run under a condition, those with branches of their own left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            for body in (node.body, node.orelse):
                if body and not any(isinstance(n, ast.If) for s in body for n in ast.walk(s)):
                    yield body


def _given(node: ast.AST) -> Iterator[ast.Constant]:
    """The numbers that a call of a method, or an index, is given directly or in a sequence."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        values = [*node.args, *(k.value for k in node.keywords)]
    elif isinstance(node, ast.Subscript):
        values = [node.slice]
    else:
        return
    while values:
        value = values.pop()
        if isinstance(value, ast.Constant):
            yield value
        elif isinstance(value, ast.Tuple | ast.List):
            values += value.elts
        elif isinstance(value, ast.Slice):
            values += [bound for bound in (value.lower, value.upper) if bound is not None]
