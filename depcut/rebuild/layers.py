"""Which whole layers a model can lose so that its class can be built anew with the others.

A number of the config counts the entries of a list of modules. That, and which lists of the config
have one entry a layer, is found by building the class with fewer; and so is which layers may change
their places: those that the class builds the same one place further to the front.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from depcut.allocate.savings import Savings
from depcut.branches.branch import Block, Branch, Residuals, bypass
from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling
from depcut.errors import VerificationError
from depcut.plan.keep import Keep
from depcut.plan.stacks import Path, Stack
from depcut.rebuild.builder import Builder
from depcut.rebuild.rebuilding import Rebuilding
from depcut.rebuild.stock import rebuilt
from depcut.rebuild.twin import Twin, alike, changes, same, twin_of, without
from depcut.support.failures import reraise_fatal
from depcut.verify.calls import verify_calls

_FEWEST = 2  # layers of which one can go
_MOST_LISTS = 3  # of the config that are cut at a time
_MOST_FIRST = 4  # layers at the front that may be of their own kind
_SEVERAL = "layers are dropped from the graph of one example call, and there are several"
_NONE = "no number of the config counts layers that are residual branches"


@dataclass(frozen=True, eq=False)
class Droppable:
    """Layers that can go as a whole.

    Attributes:
        stacks: Lists of layers, each with all of its layers.
        blocks: Layers that can go, by list, as blocks of residual branches; in the order of the
            list.
        ordered: Numbers (in `stacks`) of lists of which the last layers must go first.
        refused: Why others cannot go, by the name of the list of modules.
    """

    stacks: tuple[Stack, ...]
    blocks: Mapping[int, Mapping[int, Block]]
    ordered: frozenset[int]
    refused: Mapping[str, str]

    def without(self, names: Sequence[str]) -> tuple[Stack, ...] | None:
        """The lists that get shorter, with the layers that stay; None where a list gets empty.

        Args:
            names: Of the branches that go.
        """
        dropped = set(names)
        out = []
        for number, stack in enumerate(self.stacks):
            going = {i for i, b in self.blocks[number].items() if dropped.issuperset(b.branches)}
            kept = tuple(i for i in range(stack.count) if i not in going)
            if not kept:
                return None
            if going:
                out.append(replace(stack, kept=kept))
        return tuple(out)

    @property
    def why(self) -> str:
        """Why no layer can go."""
        return "; ".join(dict.fromkeys(self.refused.values())) or _NONE


@preserved()
def droppable(rebuilding: Rebuilding | None, model: nn.Module, residuals: Residuals) -> Droppable:
    """Which whole layers can go.

    Args:
        rebuilding: How the model's class is built anew; None where it cannot be: none can go.
        model: The model; it is only read.
        residuals: Its branches.
    """
    if rebuilding is None:
        return Droppable((), {}, frozenset(), {})
    builder, coupling = rebuilding.builder, rebuilding.coupling
    stacks: list[Stack] = []
    blocks: dict[int, dict[int, Block]] = {}
    ordered: set[int] = set()
    refused: dict[str, str] = {}
    savings = Savings(coupling, residuals, "params")
    for stack in stacks_in(builder):
        found = _blocks(coupling, savings, stack)
        holder = stack.holders[0]
        if not found:
            refused[holder] = (
                _SEVERAL
                if coupling.program.others
                else f"the layers of {holder} are no residual branches"
            )
            continue
        free, last_first = _free(builder, stack)
        mine = {i: block for i, block in found.items() if i in free}
        if last_first:  # no gaps
            mine = dict(_suffix(mine, stack))
        if not mine:
            refused[holder] = f"the class builds the layers of {holder} by their places"
            continue
        first = mine[max(mine)] if last_first else mine[min(mine)]
        why = _trial(builder, coupling, model, residuals, stack, first)
        if why:
            refused[holder] = f"without {first.name}, {why}"
            continue
        blocks[len(stacks)] = dict(sorted(mine.items()))
        ordered |= {len(stacks)} if last_first else set()
        stacks.append(stack)
    return Droppable(tuple(stacks), blocks, frozenset(ordered), refused)


def _suffix(found: Mapping[int, Block], stack: Stack) -> Iterator[tuple[int, Block]]:
    """Layers from the last one to the front, as far as they can go."""
    for i in range(stack.count - 1, 0, -1):
        if i not in found:
            return
        yield i, found[i]


# Numbers that count layers ------------------------------------------------------------------------


def stacks_in(builder: Builder) -> Iterator[Stack]:
    """Lists of layers that a number of the config counts, each list of modules once.

    Args:
        builder: Of the class.
    """
    taken: set[str] = set()
    for path, value in builder.base.items():
        if not isinstance(value, int) or value < _FEWEST or value > len(builder.dense.kinds):
            continue
        stacks = (_stack(builder, path, value, lists) for lists in _choices(builder, path, value))
        stack = next((s for s in stacks if s is not None), None)
        if stack is not None and taken.isdisjoint(stack.holders):
            taken.update(stack.holders)
            yield replace(stack, lists=(*stack.lists, *_listed(builder, stack)))


def _choices(builder: Builder, path: Path, value: int) -> Iterator[tuple[Path, ...]]:
    """Lists of the config that may have to be cut with a number: the fewest first."""
    if not isinstance(path[-1], str) or builder.twin({path: value - 1}) is not None:
        yield ()
        return
    every = [
        at
        for at, held in builder.recipe.lists.items()
        if at[:-1] == path[:-1] and len(held) == value
    ]
    for count in range(1, min(len(every), _MOST_LISTS) + 1):
        yield from itertools.combinations(every, count)


def _stack(builder: Builder, path: Path, value: int, lists: tuple[Path, ...]) -> Stack | None:
    """The layers that a number counts; None where it counts none."""
    whole = tuple(range(value))
    stack = Stack(path, lists, (), value, whole[:-1])
    built = builder.twin({}, (stack,)) if lists else builder.twin({path: value - 1})
    if built is None:
        return None
    lost = builder.dense.kinds.keys() - built.kinds.keys()
    roots = {name for name in lost if name.rpartition(".")[0] not in lost}
    holders = tuple(sorted(name.rpartition(".")[0] for name in roots))
    wanted = [str(i) for i in whole]
    children = (dict(builder.dense.model.get_submodule(h).named_children()) for h in holders)
    if not roots or any(r.rpartition(".")[2] != wanted[-1] for r in roots):
        return None
    if any([*held] != wanted for held in children):
        return None
    # A layer may be the only one of its kind: others are tried.
    for gone in dict.fromkeys((value - 1, 0, value // 2)):
        shorter = replace(stack, holders=holders, kept=tuple(i for i in whole if i != gone))
        twin = builder.twin({}, (shorter,))
        if twin is not None and _same_sizes(builder.dense, twin, shorter):
            return replace(shorter, kept=whole)
    return None


def _same_sizes(dense: Twin, twin: Twin, stack: Stack) -> bool:
    """Whether a twin is the dense one without some layers, outside of the layers that stay."""
    left = without(dense, (stack,))
    layers = tuple(f"{holder}." for holder in stack.holders)
    return (
        left.kinds.keys() == twin.kinds.keys()
        and all(
            twin.kinds[name] is kind
            for name, kind in left.kinds.items()
            if not name.startswith(layers)
        )
        and all(
            twin.shapes.get(name) == shape
            for name, shape in left.shapes.items()
            if not name.startswith(layers)
        )
    )


def _listed(builder: Builder, stack: Stack) -> tuple[Path, ...]:
    """Further lists of the config with one entry a layer: two exchanged, two layers change."""
    out = []
    for path, held in builder.recipe.lists.items():
        if path in stack.lists or path[:-1] != stack.number[:-1] or len(held) != stack.count:
            continue
        other = next((i for i, item in enumerate(held) if not same(item, held[0])), None)
        if other is None:
            continue
        order = list(range(stack.count))
        order[0], order[other] = other, 0
        try:
            built = twin_of(builder.recipe.build(builder.explicit, {path: tuple(order)}))
        except Exception as error:  # noqa: BLE001  (a library's own checks of its numbers)
            reraise_fatal(error)
            continue
        if built.kinds.keys() != builder.dense.kinds.keys():
            out.append(path)
            continue
        changed = {name for name, at in changes(builder.dense, built) if name and len(at) == 1}
        changed |= {n for n, kind in built.kinds.items() if builder.dense.kinds[n] is not kind}
        places = {_place(name, stack) for name in changed}
        if places & {0, other} and places <= {0, other, None}:
            out.append(path)
    return tuple(out)


def _place(name: str, stack: Stack) -> int | None:
    """The number of the layer that a module is in; None where it is in none."""
    for holder in stack.holders:
        if name.startswith(f"{holder}."):
            return int(name[len(holder) + 1 :].partition(".")[0])
    return None


# Layers that can go -------------------------------------------------------------------------------


def _blocks(coupling: Coupling, savings: Savings, stack: Stack) -> dict[int, Block]:
    """Layers of which nothing is left once their residual branches go, by number."""
    inside: dict[int, list[Branch]] = {}
    for branch in savings.branches.values():
        places = {_place(name, stack) for name in branch.parameters}
        if len(places) == 1 and None not in places:
            inside.setdefault(next(iter(places)) or 0, []).append(branch)
    own: dict[int | None, set[str]] = {}
    for name in coupling.program.parameters:
        own.setdefault(_place(name, stack), set()).add(name)
    out = {}
    for number, branches in sorted(inside.items()):
        names = tuple(branch.name for branch in branches)
        if savings.tensors(names) & coupling.program.parameters == own[number]:
            stream = _stream(branches, bypass(branches))
            out[number] = Block(f"{stack.holders[0]}.{number}", names, *stream)
    return out


def _stream(
    branches: Sequence[Branch], through: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """The stream before a layer, and after it."""
    result = max(branch.total for branch in branches)
    before = result
    while before in through:
        before = through[before]
    return before, result


def _free(builder: Builder, stack: Stack) -> tuple[frozenset[int], bool]:
    """Layers that may go; and whether it must be the last ones first.

    Where a layer goes, each of those behind it is built one place further to the front: if they are
    the same there, it may go.
    """
    every = range(stack.count)
    for first in range(min(_MOST_FIRST, stack.count - 1)):
        if fits(builder, (replace(stack, kept=tuple(i for i in every if i != first)),)):
            last = fits(builder, (replace(stack, kept=tuple(every[:-1])),))
            return frozenset(every[first:] if last else every[first:-1]), False
    return frozenset(every[1:]), True


def fits(builder: Builder, stacks: tuple[Stack, ...]) -> bool:
    """Whether the class builds the layers that stay as they are, at the dense widths.

    Args:
        builder: Of the class.
        stacks: Which layers stay.
    """
    twin = builder.twin({}, stacks)
    if twin is None or not alike(without(builder.dense, stacks), twin):
        return False
    if any(twin.shapes[n] != builder.dense.shapes[n] for n in twin.shapes):
        return False
    new = changes(builder.dense, twin)
    # What the config says otherwise, hangs from many modules.
    told = [
        (builder.dense.attributes[n].get(at), now)
        for (n, at), now in new.items()
        if n == "" and len(at) > 1
    ]
    for (name, at), now in new.items():
        stack = next((s for s in stacks if _place(name, s) is not None), None)
        if stack is None:
            continue
        was = builder.dense.attributes[name].get(at)
        if len(at) > 1 and any(same(was, a) and same(now, b) for a, b in told):
            continue
        place = _place(name, stack) or 0
        moved = place - stack.kept.index(place)
        if type(was) is int and type(now) is int and was - now == moved:
            continue  # its number, which caches go by
        return False
    return True


def _trial(
    builder: Builder,
    coupling: Coupling,
    model: nn.Module,
    residuals: Residuals,
    stack: Stack,
    block: Block,
) -> str | None:
    """Drop one layer alone, and compare by value: what is wrong, None if nothing is."""
    number = _place(f"{block.name}.", stack)
    stacks = (replace(stack, kept=tuple(i for i in range(stack.count) if i != number)),)
    twin = builder.twin({}, stacks)
    if twin is None:
        return "the class cannot be built"
    keep = Keep(coupling, {}, bypass=bypass(residuals.named(block.branches)))
    try:
        verify_calls(rebuilt(model, keep, builder.dense, twin, stacks), model)
    except VerificationError as error:
        return error.what + (f" [{error.where}]" if error.where else "")
    return None
