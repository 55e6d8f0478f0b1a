"""Tables of what is known of operators, the table of rules, and the `Op` that a rule receives.

A rule is one function for one family of operators. It unifies the terms of the operator's
dimensions, returns those of its outputs, and records beside them what else depends on widths:
the size literals among its arguments, what it contracts, its MACs. A target without a rule is
never guessed: the dimensions it touches are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import fx

from depcut import axes
from depcut.axes import Dims, Reason, Term
from depcut.errors import RuleError
from depcut.graph.arguments import Path, argument, has_argument, path_of
from depcut.graph.operators import base_name, is_pointwise, names_of

Output = Dims | Sequence[Dims | None] | None
Rule = Callable[["Op"], Output]
F = TypeVar("F", bound=Callable[..., Any])


class Table(dict[str, F]):
    """Functions by operator name, for one aspect of operators.

    Args:
        aspect: What the functions are, in a message.
    """

    def __init__(self, aspect: str) -> None:
        super().__init__()
        self.aspect = aspect

    def register(self, *targets: str) -> Callable[[F], F]:
        """A decorator that enters a function for some operators.

        Args:
            targets: Operator names as torch.export prints them; without the overload
                ("aten.linear") they stand for every overload that has none of its own, and for
                the operator that works in place.

        Raises:
            RuleError: One of the targets has a function already.
        """

        def enter(function: F) -> F:
            for target in targets:
                if target in self:
                    known = self[target]
                    raise RuleError(
                        f"{target} has a {self.aspect} already: {known.__module__}."
                        f"{known.__name__}",
                        remedy=f"change that {self.aspect}, or register the new one for another "
                        "overload",
                    )
                self[target] = function
            return function

        return enter

    def find(self, target: Any) -> F | None:
        """The function of an operator: of its overload, of its name, or of what it works like."""
        return next((self[name] for name in names_of(target) if name in self), None)


RULES: Table[Rule] = Table("rule")


def aten(names: str) -> list[str]:
    """Names of torch's own operators, from words."""
    return [f"aten.{name}" for name in names.split()]


def rule(*targets: str) -> Callable[[Rule], Rule]:
    """Register an operator rule, e.g. `@depcut.rule("aten.linear.default")`.

    Args:
        targets: Operator names as torch.export prints them; without the overload ("aten.linear")
            the rule holds for every overload that has none of its own, and for the operator that
            works in place.

    Raises:
        RuleError: One of the targets has a rule already.
    """
    return RULES.register(*targets)


def unregister(*targets: str) -> None:
    """Take rules out of the table, so that others can be registered for the same targets."""
    for target in targets:
        RULES.pop(target, None)


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator: of its overload, of its name, or, by torch's tag, pointwise."""
    registered = RULES.find(target)
    return RULES["pointwise"] if registered is None and is_pointwise(target) else registered


def is_pointwise_rule(target: Any) -> bool:
    """Whether an operator's dimensions unify one by one, and nothing else is known of it."""
    return rule_for(target) is RULES["pointwise"]


@dataclass(frozen=True)
class Literal:
    """A size among an operator's arguments: it equals `sign` times the count of `term`."""

    path: Path
    term: Term
    sign: int = 1


@dataclass
class Effects:
    """What a rule records of one node, besides unifying its terms."""

    out: Output = None
    literals: list[Literal] = field(default_factory=list)
    pins: dict[str, float] = field(default_factory=dict)
    contracts: list[tuple[fx.Node, int]] = field(default_factory=list)
    counterparts: dict[tuple[fx.Node, int], tuple[fx.Node, int]] = field(default_factory=dict)
    statistics: list[Term] = field(default_factory=list)
    macs: list[tuple[float, Dims]] = field(default_factory=list)
    ties: list[list[Term]] = field(default_factory=list)
    floors: list[tuple[int, Term]] = field(default_factory=list)
    multiples: list[tuple[int, Term]] = field(default_factory=list)
    rescales: list[tuple[fx.Node, fx.Node, int]] = field(default_factory=list)


class Op:
    """One node as its rule sees it: arguments by schema name, dimensions as terms.

    Args:
        node: The graph node.
        env: Terms of the nodes before it.
        sizes: Sizes (hints) of every tensor of the graph, by node.
        for_shape: Says whether the code reads nothing of the result but its shape.
    """

    def __init__(
        self,
        node: fx.Node,
        env: dict[fx.Node, Output],
        sizes: dict[fx.Node, Any],
        for_shape: Callable[[], bool] = lambda: False,
    ) -> None:
        self.node, self.env, self.sizes, self.for_shape = node, env, sizes, for_shape
        self.effects = Effects()

    def arg(self, name: str) -> Any:
        """The argument of that name, or its default."""
        return argument(self.node, name)

    def has(self, name: str) -> bool:
        """Whether the operator's schema has an argument of that name."""
        return has_argument(self.node, name)

    def dims(self, tensor: str | fx.Node | Any) -> Dims:
        """The resolved terms of a tensor argument, given by name or as a node."""
        node = self.arg(tensor) if isinstance(tensor, str) else tensor
        terms = self.env[node]
        if not isinstance(terms, tuple):
            raise RuleError(f"{node} is not a single tensor", where=str(self.node))
        return tuple(map(axes.resolve, terms))

    def tensors(self) -> list[fx.Node]:
        """All tensor nodes among the arguments."""
        return [n for n in self.node.all_input_nodes if isinstance(self.env.get(n), tuple)]

    @property
    def name(self) -> str:
        """The operator's name without namespace, overload and the mark of working in place."""
        return base_name(self.node)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """Sizes of the (first) output."""
        sizes = self.sizes[self.node]
        return sizes[0] if sizes and isinstance(sizes[0], tuple) else sizes

    def unify(self, a: Term, b: Term) -> None:
        """Make two terms denote the same indices."""
        axes.unify(a, b, self.node.name)

    def freeze(self, term: Term, why: str) -> None:
        """Freeze a term with a reason."""
        axes.freeze(term, Reason(why, self.node.name))

    def frozen(self, size: int, why: str) -> Term:
        """A fresh frozen dimension."""
        return axes.axis(size, Reason(why, self.node.name))

    def broadcast(self, *shapes: Dims) -> Dims:
        """Unify shapes aligned at the right; a size of 1 couples nothing."""
        out: list[Term] = [axes.UNIT] * max(map(len, shapes), default=0)
        for shape in shapes:
            for i in range(-1, -len(shape) - 1, -1):
                if shape[i].size == 1:
                    continue
                if out[i].size == 1:
                    out[i] = shape[i]
                else:
                    self.unify(out[i], shape[i])
        return tuple(out)

    def literal(self, name: str, *sub: int, term: Term, sign: int = 1) -> None:
        """Record that an argument (or an item of it) is the size of `term`; no default is."""
        path = path_of(self.node, name, *sub)
        if path is not None:
            self.effects.literals.append(Literal(path, term, sign))

    def literals(self, name: str, terms: Sequence[Term]) -> None:
        """Record a list of sizes; a -1 adapts by itself."""
        values = self.arg(name)
        for i, term in enumerate(terms):
            if not isinstance(values[i], int) or values[i] >= 0:
                self.literal(name, i, term=term)

    def pin(self, name: str, value: float) -> None:
        """Record an argument whose default depends on a width: it must stay at `value`."""
        self.effects.pins[name] = value

    def contract(
        self, tensor: str | fx.Node, dim: int, against: tuple[str, int] | None = None
    ) -> None:
        """Record that the operator sums over a dimension of one of its arguments.

        Args:
            tensor: The argument, the weight where there is one.
            dim: Its dimension.
            against: The argument and dimension it is multiplied with, if zeros there do as well.
        """
        node = self.arg(tensor) if isinstance(tensor, str) else tensor
        place = (node, dim % len(self.dims(node)))
        self.effects.contracts.append(place)
        if against is not None:
            other = self.arg(against[0])
            self.effects.counterparts[place] = (other, against[1] % len(self.dims(other)))

    def statistic(self, *terms: Term) -> None:
        """Record that the result depends on which indices of `terms` there are (norms, means)."""
        self.effects.statistics += terms

    def macs(self, *terms: Term, times: float = 1.0) -> None:
        """Record multiply-accumulates: the product of the counts of all terms."""
        self.effects.macs.append((times, terms))

    def at_least(self, count: int, term: Term) -> None:
        """Demand that every axis of a term keeps at least so many indices."""
        self.effects.floors.append((count, term))

    def multiple_of(self, count: int, term: Term) -> None:
        """Demand that what every axis of a term keeps is a multiple of a count.

        Where its size is none, of the greatest common divisor of both.
        """
        self.effects.multiples.append((count, term))

    def tie(self, terms: Sequence[Term]) -> None:
        """Demand that all terms keep equally many indices (not the same ones)."""
        self.effects.ties.append(list(terms))


def dim_of(dim: int, ndim: int) -> int:
    """A dimension number made non-negative."""
    return dim % ndim if ndim else 0


def dims_of(dim: Any, ndim: int) -> list[int]:
    """A dimension argument (None or empty: all) as a list of non-negative numbers."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    return [dim_of(d, ndim) for d in (dim if isinstance(dim, list | tuple) else [dim])]
