"""Which module attributes must change so that the model's own code computes the new sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx, nn

from depcut.axes import resolve
from depcut.capture.program import module_of
from depcut.capture.provenance import OPERATORS, Expr, literals_of
from depcut.plan.keep import Keep
from depcut.plan.lengths import is_fixed

Attribute = tuple[str, tuple[Any, ...]]
Lookup = Callable[[Attribute], int | None]


@dataclass(frozen=True)
class Solution:
    """Attribute values with which the model's own classes compute the new sizes.

    Attributes:
        values: New value of each attribute that has to change, by module and path.
        stuck: Nodes whose sizes the code cannot express, with the reason.
    """

    values: dict[Attribute, int]
    stuck: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, str]:
        """Modules that have to be generated, with the first reason of each."""
        out: dict[str, str] = {}
        for node, why in self.stuck.items():
            out.setdefault(_owner(node), why)
        return out


def _owner(node: fx.Node) -> str:
    """The module whose code a node comes from; a constant's is the one that uses it."""
    while not node.meta.get("nn_module_stack") or "_empty" in str(node.meta["nn_module_stack"]):
        user = next(iter(node.users), None)
        if user is None or user.op == "output":
            return ""
        node = user
    return module_of(node)


@dataclass(frozen=True)
class _Demand:
    node: fx.Node
    expr: Expr | None
    dense: int
    target: int


def solve(keep: Keep, model: nn.Module) -> Solution:
    """Find attribute values under which every size literal becomes what the kept counts demand.

    Args:
        keep: What stays.
        model: The dense model, for attributes that nothing demands to change.
    """
    demands = list(_demands(keep))
    values, conflicts = _assign(demands, keep)

    def settled(attribute: Attribute) -> int | None:
        return values.get(attribute, attribute_value(model, attribute))

    for demand in demands:
        if isinstance(demand.expr, tuple) and evaluate(demand.expr, keep, settled) != demand.target:
            _derive_one(demand, keep, values, settled)
    conflicts |= _compared(keep, values, settled, model)
    stuck = _stuck(demands, keep, conflicts, settled)
    return Solution({a: v for a, v in values.items() if a not in conflicts}, stuck)


def _assign(demands: list[_Demand], keep: Keep) -> tuple[dict[Attribute, int], set[Attribute]]:
    """Values of attributes that supply a size directly or by solving; those in conflict."""
    values: dict[Attribute, int] = {}
    conflicts: set[Attribute] = set()
    composite = []
    for demand in demands:
        if isinstance(demand.expr, tuple):
            if demand.expr[0] == "attr":
                _propose(_attribute(demand.expr), demand.target, values, conflicts)
            else:
                composite.append(demand)
    while any([_derive(demand, keep, values, values.get) for demand in composite]):  # noqa: C419
        pass
    return values, conflicts


def _compared(
    keep: Keep, values: Mapping[Attribute, int], settled: Lookup, model: nn.Module
) -> set[Attribute]:
    """Attributes whose new value would change how the code compares it.

    An attribute that is compared with a length is one, too, whatever its width is.
    """
    changed = {a for a, value in values.items() if value != attribute_value(model, a)}
    out: set[Attribute] = set()
    for program in keep.coupling.program.examples if changed else ():
        for comparison in program.comparisons:
            name, (left, right) = comparison.operator, comparison.sides
            mine = changed.intersection((*attributes_in(left), *attributes_in(right)))
            if not mine:
                continue
            fixed = right is not None and all(is_fixed(e, keep.coupling) for e in (left, right))
            if fixed and _is_of_one(left, right, keep, settled):
                continue
            if not fixed or _outcome(name, left, right, keep, settled) != _outcome(
                name, left, right, Keep(keep.coupling, {}), lambda a: attribute_value(model, a)
            ):
                out |= mine
    return out


def _is_of_one(left: Expr, right: Expr, keep: Keep, lookup: Lookup) -> bool:
    """Whether a number that becomes 1 is compared with 1.

    Code that asks for that skips what does nothing to one of a kind (to repeat, to split). That it
    computes the same is for the verification to see.
    """
    other = left if right == 1 else right
    return 1 in (left, right) and evaluate(other, keep, lookup) == 1


def _outcome(name: str, left: Expr, right: Expr, keep: Keep, lookup: Lookup) -> bool | None:
    a, b = evaluate(left, keep, lookup), evaluate(right, keep, lookup)
    return None if a is None or b is None else bool(getattr(operator, name)(a, b))


def _stuck(
    demands: list[_Demand], keep: Keep, conflicts: set[Attribute], settled: Lookup
) -> dict[fx.Node, str]:
    """Nodes whose numbers the code will not compute, with the reason."""
    stuck: dict[fx.Node, str] = {}
    graphs = [p.graph.graph for p in keep.coupling.program.examples]
    # What runs in training only cannot be generated.
    for demand in (d for d in demands if d.node.graph in graphs):
        why = _unmet(demand, keep, conflicts, settled)
        if why:
            stuck.setdefault(demand.node, why)
    for node, why in _repurposed(keep, demands, settled):
        stuck.setdefault(node, why)
    for node in keep.coupling.effects:
        for name in keep.pins(node):
            stuck.setdefault(node, f"the implicit {name} would change with the width")
    return stuck


def attribute_value(model: nn.Module, attribute: Attribute) -> int | None:
    """The dense value of a module attribute."""
    module, path = attribute
    value: Any = vars(model.get_submodule(module)).get(path[0])
    for step in path[1:]:
        value = value[step]
    return value if type(value) is int else None


def _demands(keep: Keep) -> Iterator[_Demand]:
    for node in keep.coupling.effects:
        literals = list(keep.literals(node))
        if not literals:
            continue
        provenance = by_path(node)
        for literal, value, _, new in literals:
            if isinstance(value, int):
                yield _Demand(node, provenance.get(literal.path), value, literal.sign * new)


def by_path(node: fx.Node) -> dict[tuple[int | str, ...], Expr | None]:
    """Provenance of every int argument, matched in order with the ints that the call received."""
    received = literals_of(node)
    return {path: None if at is None else received[at][1] for path, at in _matched(node).items()}


def number_of(node: fx.Node, path: tuple[int | str, ...]) -> int | None:
    """Which of the numbers that the call received became an argument of the node.

    Args:
        node: A node that the call created.
        path: Of an int among the node's arguments.

    Returns:
        An index into `literals_of(node)`; None where torch computed it.
    """
    return _matched(node).get(path)


def _matched(node: fx.Node) -> dict[tuple[int | str, ...], int | None]:
    received = literals_of(node)
    ints = [i for i, (value, _) in enumerate(received) if type(value) is int]
    out: dict[tuple[int | str, ...], int | None] = {}
    if not ints:
        return out
    at = 0
    for path, value in _ints(node):
        match = next((k for k in range(at, len(ints)) if received[ints[k]][0] == value), None)
        if match is not None:
            out[path] = ints[match]
            at = match + 1
        else:
            equal = [i for i in ints if received[i][0] == value]
            known = (i for i in equal if received[i][1] is not None)
            out[path] = next(known, equal[0] if equal else None)
    return out


def _ints(node: fx.Node) -> Iterator[tuple[tuple[int | str, ...], int]]:
    def walk(
        value: Any, path: tuple[int | str, ...]
    ) -> Iterator[tuple[tuple[int | str, ...], int]]:
        if type(value) is int:
            yield path, value
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield from walk(item, (*path, i))

    for i, value in enumerate(node.args):
        yield from walk(value, (i,))
    for name, value in node.kwargs.items():
        yield from walk(value, (name,))


def _attribute(expr: tuple[Any, ...]) -> Attribute:
    return expr[1], expr[2]


def _propose(
    attribute: Attribute, target: int, values: dict[Attribute, int], conflicts: set[Attribute]
) -> None:
    if values.setdefault(attribute, target) != target:
        conflicts.add(attribute)


def evaluate(expr: Expr, keep: Keep, lookup: Lookup) -> float | None:
    """The value of a provenance expression under the new attributes and sizes; None: unknown."""
    if isinstance(expr, int | float):
        return expr
    kind = expr[0]
    if kind == "attr":
        return lookup(_attribute(expr))
    if kind in ("size", "numel"):
        node = keep.coupling.program.marks.get(expr[1])
        dims = keep.coupling.env.get(node) if node is not None else None
        if not isinstance(dims, tuple):
            return None
        if kind == "size":
            return keep.count(dims[expr[2]])
        total = 1
        for term in dims:
            total *= keep.count(resolve(term))
        return total
    left, right = (evaluate(e, keep, lookup) for e in expr[1:3])
    if left is None or right is None or (kind in ("//", "%") and right == 0):
        return None
    return cast(float, OPERATORS[kind](left, right))


def _repurposed(
    keep: Keep, demands: list[_Demand], lookup: Lookup
) -> Iterator[tuple[fx.Node, str]]:
    """Calls that would receive another number where it is no size: scales, divisors, constants.

    One call may create several nodes, of which one holds the literal.
    """
    sizes = {(id(literals_of(d.node)), d.dense) for d in demands}
    for node in (n for p in keep.coupling.program.examples for n in p.graph.graph.nodes):
        received = () if node in keep.gone.nodes else literals_of(node)
        for value, expr in received:
            if expr is None or (id(received), value) in sizes:
                continue
            new = evaluate(expr, keep, lookup)
            if new is not None and abs(new - value) > 1e-12 * abs(value):
                yield node, f"its code would use {new:.6g} where the dense model uses {value:.6g}"


def _derive(demand: _Demand, keep: Keep, values: dict[Attribute, int], lookup: Lookup) -> bool:
    """Solve an expression for the one attribute in it that is still open; True if it was set."""
    assert isinstance(demand.expr, tuple)
    if evaluate(demand.expr, keep, lookup) is not None:
        return False
    solution = invert(demand.expr, demand.target, keep, lookup)
    if solution is None:
        return False
    attribute, value = solution
    if (
        evaluate(demand.expr, keep, lambda a: value if a == attribute else lookup(a))
        != demand.target
    ):
        return False
    values[attribute] = value
    return True


def _derive_one(demand: _Demand, keep: Keep, values: dict[Attribute, int], settled: Lookup) -> None:
    """Solve for one attribute of several that nothing else decides, the others as they are."""
    assert isinstance(demand.expr, tuple)
    for candidate in attributes_in(demand.expr):
        if candidate not in values and _derive(
            demand,
            keep,
            values,
            lambda a, c=candidate: None if a == c else settled(a),  # type: ignore[misc]
        ):
            return


def attributes_in(expr: Expr | None) -> Iterator[Attribute]:
    """The attributes that a provenance expression reads."""
    if not isinstance(expr, tuple):
        return
    if expr[0] == "attr":
        yield _attribute(expr)
    elif expr[0] in OPERATORS:
        yield from attributes_in(expr[1])
        yield from attributes_in(expr[2])


def invert(expr: Expr, target: int, keep: Keep, lookup: Lookup) -> tuple[Attribute, int] | None:
    """The attribute that an expression follows from, and its value for another result.

    Args:
        expr: Where a number comes from.
        target: What it is to become.
        keep: What stays.
        lookup: The attributes that are known; None for the one that is sought.

    Returns:
        None where no single attribute, or no whole number, gives the result.
    """
    if isinstance(expr, int | float):
        return None
    if expr[0] == "attr":
        return _attribute(expr), target
    if expr[0] not in OPERATORS:
        return None
    left, right = (evaluate(e, keep, lookup) for e in expr[1:3])
    if (left is None) == (right is None):
        return None
    known = left if left is not None else right
    assert known is not None
    known = int(known)
    wanted: dict[str, int | None] = {
        "+": target - known,
        "-": target + known if left is None else known - target,
        "*": target // known if known else None,
        "//": target * known if left is None else (known // target if target else None),
    }
    value = wanted.get(expr[0])
    if value is None:
        return None
    return invert(expr[1] if left is None else expr[2], value, keep, lookup)


def _unmet(demand: _Demand, keep: Keep, conflicts: set[Attribute], lookup: Lookup) -> str | None:
    """Why the code will not compute the demanded size; None where it will."""
    expr = demand.expr
    if expr is None:
        if demand.target == demand.dense:
            return None
        return f"{demand.dense} is typed into the code (or computed out of sight)"
    if isinstance(expr, tuple) and expr[0] == "attr" and _attribute(expr) in conflicts:
        return f"attribute {expr[2][0]!r} would need several values"
    value = evaluate(expr, keep, lookup)
    if value is None:
        return None if demand.target == demand.dense else "its size is computed out of sight"
    if value != demand.target:
        return f"its code computes {value} where {demand.target} is needed"
    return None
