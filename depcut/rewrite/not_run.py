"""Branches that the example calls do not run: numbers of the dense model that stand in them.

What is exchanged in the code that runs is exchanged where the same expression stands in a branch
that does not. Where a branch holds other numbers of the dense model it is guarded: it raises.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from depcut import axes
from depcut.capture.program import module_of, parent_of
from depcut.plan.keep import Keep
from depcut.rewrite.edits import Edit, FunctionPatch, Patch
from depcut.rewrite.functions import NoSourceError, Source, method_holding, source_of

_SIZED = frozenset(
    {"view", "reshape", "unflatten", "expand", "repeat", "split", "narrow", "zeros", "ones"}
    | {"empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full"}
    | {"group_norm", "layer_norm", "conv1d", "conv2d", "conv3d", "broadcast_to", "arange"}
)
_ROOTS = frozenset({"sqrt", "rsqrt"})
_ATTENTION = "scaled_dot_product_attention"


def changed_sizes(keep: Keep) -> dict[str, set[int]]:
    """Dense sizes that the plan changes, by the modules whose code may name them."""
    coupling = keep.coupling
    out: dict[str, set[int]] = {}

    def note(name: str, dims: Any) -> None:
        for term in dims or ():
            resolved = axes.resolve(term)
            parts = [resolved, *getattr(resolved, "factors", ()), *axes.leaves(resolved)]
            sizes = {p.size for p in parts if keep.count(p) != p.size}
            out.setdefault(name, set()).update(sizes)

    for program in coupling.program.examples:
        for node in program.graph.graph.nodes:
            dims = coupling.env.get(node)
            if isinstance(dims, tuple):
                name = module_of(node)
                note(name, dims)
                if name:
                    note(parent_of(name), dims)
    return out


@dataclass(frozen=True)
class _Branch:
    """A body of statements that did not run.

    Attributes:
        body: The statements.
        compared: What its condition compares: a length there is one inside of it, too.
    """

    body: list[ast.stmt]
    compared: frozenset[str] = frozenset()


class Branches:
    """Edits of the branches of a module's methods that did not run.

    Args:
        keep: What stays.
        name: Of the module.
        dense: The module in the dense model.
        slim: The same in the smaller one.
        changed: Dense sizes that its code may name and that are others now.
    """

    def __init__(
        self, keep: Keep, name: str, dense: nn.Module, slim: nn.Module, changed: Collection[int]
    ) -> None:
        self.changed = frozenset(size for size in changed if size > 1)
        self.dense, self.slim = vars(dense), vars(slim)
        programs = keep.coupling.program.examples
        self.ran = [program.lines for program in programs]
        self.codes = frozenset[CodeType]().union(*(p.codes.get(name, ()) for p in programs))

    def edits(self, function: FunctionType, known: Collection[Edit] = ()) -> set[Edit]:
        """Edits of a function beside those of the code that runs.

        Args:
            function: The function; nothing is said of one that no call was seen to run.
            known: The edits of the code that runs.
        """
        try:
            source = source_of(function.__code__)
        except NoSourceError:
            return set()
        file = function.__code__.co_filename
        out: set[Edit] = set()
        twins = _twins(source, known)
        for branch in self._branches(source.tree, file):
            found: set[Edit] = set()
            suspect = self._suspect(branch, source, twins, found)
            if suspect is None:
                out |= found
                continue
            first = branch.body[0]
            line, column = first.lineno - source.line, first.col_offset
            text = f"{ast.unparse(suspect)} in a branch of {function.__qualname__}"
            out.add(Edit((line, column, line, column), "guard", 0, name=text))
        return out

    def _branches(self, tree: ast.AST, file: str) -> Iterator[_Branch]:
        """Outermost bodies of which no line was seen to run, in a function that ran."""
        for node in ast.iter_child_nodes(tree):
            bodies = [getattr(node, field, None) for field in ("body", "orelse")]
            if not isinstance(node, ast.If | ast.For | ast.While):
                yield from self._branches(node, file)
                continue
            for body in bodies:
                if not body or not isinstance(body, list):
                    continue
                if body[0].col_offset == node.col_offset:  # an elif
                    yield from self._branches(ast.Module(body, []), file)
                    continue
                lines = range(body[0].lineno, body[-1].end_lineno + 1)
                if any((file, line) in ran for ran in self.ran for line in lines):
                    for statement in body:
                        yield from self._branches(ast.Module([statement], []), file)
                else:
                    yield _Branch(body, _compared(node))

    def _suspect(
        self, branch: _Branch, source: Source, twins: Mapping[str, Edit], found: set[Edit]
    ) -> ast.expr | None:
        """An expression of the dense model's numbers; what can be exchanged goes to `found`."""
        if not self.changed:
            return None
        for statement in branch.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and _called(node) == _ATTENTION:
                    if any(k.arg == "scale" for k in node.keywords):
                        continue
                    twin = twins.get(f"scale of {ast.unparse(node.func)}")
                    if twin is None:
                        return node
                    found.add(replace(twin, span=source.span(node)))
                for place in _places(node):
                    if ast.unparse(place) in branch.compared:
                        continue
                    twin = twins.get(ast.unparse(place))
                    if twin is not None:
                        found.add(replace(twin, span=source.span(place)))
                    elif self._is_dense(place, source.tree, frozenset()):
                        return place
                if (
                    isinstance(node, ast.expr)
                    and _is_root(node)
                    and _computes(statement)
                    and any(
                        _reads_size(n) or self._is_dense(n, source.tree, frozenset())
                        for n in ast.walk(node)
                    )
                ):
                    return node
        return None

    def _is_dense(self, node: ast.AST, function: ast.FunctionDef, seen: frozenset[str]) -> bool:
        """Whether an expression gives a size of the dense model, or is computed from one."""
        if isinstance(node, ast.Constant):
            return type(node.value) is int and node.value in self.changed
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                return False
            value = self.slim.get(node.attr)
            same = type(value) is int and self.dense.get(node.attr) == value
            return same and value in self.changed
        if isinstance(node, ast.Name) and node.id not in seen:
            return any(
                self._is_dense(value, function, seen | {node.id})
                for value in _assigned(node.id, function)
            )
        if isinstance(node, ast.BinOp):
            sides = (node.left, node.right)
            return any(self._is_dense(side, function, seen) for side in sides)
        if isinstance(node, ast.UnaryOp):
            return self._is_dense(node.operand, function, seen)
        if isinstance(node, ast.Tuple | ast.List):
            return any(self._is_dense(item, function, seen) for item in node.elts)
        return False


def with_branches(patch: Patch, extra: Mapping[int, Collection[Edit]]) -> Patch:
    """A patch with further edits, by the number of the function."""
    return tuple(
        replace(part, edits=tuple(sorted({*part.edits, *extra.get(i, ())})))
        for i, part in enumerate(patch)
    )


def guard_patch(kind: type[nn.Module], branches: Branches) -> Patch:
    """A patch that only deals with the branches that did not run.

    Args:
        kind: The class of the module.
        branches: Of the module.
    """
    parts: dict[str, FunctionPatch] = {}
    for code in branches.codes:
        held = method_holding(kind, code)
        if held is None or held[0] in parts:
            continue
        name, function = held
        edits = branches.edits(function)
        if edits:
            digest = source_of(function.__code__).digest
            parts[name] = FunctionPatch(
                name, None, function.__qualname__, digest, tuple(sorted(edits))
            )
    return tuple(parts[name] for name in sorted(parts))


def _twins(source: Source, edits: Collection[Edit]) -> dict[str, Edit]:
    """By its text, the one edit of an expression that is not a number alone."""
    found: dict[str, set[Edit]] = {}
    where: dict[Any, list[ast.AST]] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.expr):
            where.setdefault(source.span(node), []).append(node)
    for edit in edits:
        for node in where.get(edit.span, ()):
            key = ""
            if edit.kind == "keyword" and isinstance(node, ast.Call):
                key = f"{edit.name} of {ast.unparse(node.func)}"
            elif edit.kind in ("set", "scale") and any(
                isinstance(n, ast.Name) for n in ast.walk(node)
            ):
                key = ast.unparse(node)
            if key:
                found.setdefault(key, set()).add(replace(edit, span=(0, 0, 0, 0)))
    return {key: next(iter(same)) for key, same in found.items() if len(same) == 1}


def _compared(node: ast.If | ast.For | ast.While) -> frozenset[str]:
    """The sides of the comparisons in a condition."""
    test = None if isinstance(node, ast.For) else node.test
    found = (n for n in ast.walk(test or ast.Pass()) if isinstance(n, ast.Compare))
    return frozenset(ast.unparse(side) for n in found for side in (n.left, *n.comparators))


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _places(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions that are sizes: arguments of what takes sizes, bounds of slices."""
    if isinstance(node, ast.Call) and _called(node) in _SIZED:
        items = [*node.args, *(k.value for k in node.keywords if k.arg not in ("dim", "axis"))]
        for item in items:
            yield from item.elts if isinstance(item, ast.Tuple | ast.List) else (item,)
    if isinstance(node, ast.Slice):
        yield from (bound for bound in (node.lower, node.upper) if bound is not None)


def _is_root(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Pow)
    return isinstance(node, ast.Call) and _called(node) in _ROOTS


def _reads_size(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "shape"
    return isinstance(node, ast.Call) and _called(node) == "size"


def _computes(statement: ast.stmt) -> bool:
    """Whether a statement computes with tensors: it would have been seen to run."""
    return any(
        (isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult))
        or (isinstance(n, ast.Call) and hasattr(torch.Tensor, _called(n)) and not _reads_size(n))
        for n in ast.walk(statement)
    )


def _assigned(name: str, function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What is assigned to a local name."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=False):
                    if isinstance(part, ast.Name) and part.id == name:
                        yield value
