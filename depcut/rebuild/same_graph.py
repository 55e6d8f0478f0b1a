"""Whether a class built from other numbers computes the captured graph at the new widths.

Where weights have no values, this stands for a comparison of outputs: node by node, both graphs
have the same operators, and arguments that differ in the sizes that the kept counts tell alone.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from depcut.capture.capture import captured_again
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.errors import DepcutError
from depcut.graph.operators import base_name
from depcut.plan.keep import Keep
from depcut.reference.slices import take

Pairs = Mapping[fx.Node, fx.Node]
_Path = tuple[int | str, ...]
_ABSENT = object()
# They move numbers and compute none; their first argument is what they show.
_VIEWS = frozenset(
    "alias clone contiguous expand flatten reshape slice squeeze unflatten unsqueeze view".split()
)


def valueless(model: nn.Module) -> bool:
    """Whether parameters of a model are on the meta device.

    Args:
        model: Any model.
    """
    return any(parameter.is_meta for parameter in model.parameters())


def other_code(keep: Keep, built: nn.Module) -> str | None:
    """What a class built with new numbers computes otherwise than the captured graphs say.

    Args:
        keep: What stays.
        built: The class; it is only read.

    Returns:
        The first difference in words; None where there is none.
    """
    try:
        for call in keep.calls:
            _, why = paired(call, captured_of(call.coupling.program, built))
            if why is not None:
                return why
    except DepcutError as error:
        return error.what
    return None


def captured_of(program: Program, built: nn.Module) -> Program:
    """The graph of a class built with new numbers, captured on the meta device as another was.

    Args:
        program: The graph of the dense model, captured on the meta device.
        built: The class; it is only read.

    Raises:
        CaptureError: It does not take the inputs.
    """
    with preserved():
        empty = copy.deepcopy(built).to("meta").eval()
        return captured_again(empty, (program.args, program.kwargs), program)


def paired(keep: Keep, built: Program) -> tuple[Pairs, str | None]:
    """The node of a built class for each node of the dense graph.

    Where the class leaves out views that are idle at the new sizes (heads repeated once), the nodes
    that are no views are paired, and the sizes of their results compared.

    Args:
        keep: What stays of the dense graph.
        built: The graph of the class built with new numbers.

    Returns:
        The nodes by those of the dense graph, and the first difference in words: None where the
        graphs are the same at the new widths.
    """
    pairs, why = _paired(keep, built, frozenset())
    if why is not None:
        loosely, still = _paired(keep, built, _VIEWS)
        if still is None:
            return loosely, None
    return pairs, why


def _paired(keep: Keep, built: Program, passed: frozenset[str]) -> tuple[Pairs, str | None]:
    """Nodes in pairs, those of some operators passed over."""
    pairs: dict[fx.Node, fx.Node] = {}
    dense = keep.coupling.program
    nodes, others = _computing(dense, passed), _computing(built, passed)
    for node, other in itertools.zip_longest(nodes, others):
        if node is None or other is None:
            return pairs, "its code runs more operators or fewer"
        if node.op != other.op or (node.op == "call_function" and node.target != other.target):
            return pairs, f"its code runs {other.target} in place of {node.target}"
        pairs[node] = other
        why = _held(keep, built, node, other) or _arguments(keep, pairs, passed, node, other)
        if why is None and passed:
            why = _sizes(keep, built, node, other)
        if why is not None:
            return pairs, why
    return pairs, None


def _sizes(keep: Keep, built: Program, node: fx.Node, other: fx.Node) -> str | None:
    """How the results of two nodes differ in size."""
    terms = keep.coupling.env.get(node)
    if not isinstance(terms, tuple):
        return None
    wanted, got = tuple(map(keep.count, terms)), built.sizes.get(other)
    return None if got == wanted else f"{node.target} gives {got} where {wanted} is needed"


def _source(node: fx.Node, passed: frozenset[str]) -> fx.Node:
    """What a node shows, operators that are passed over left out."""
    while node.op == "call_function" and base_name(node) in passed:
        node = node.all_input_nodes[0]
    return node


def _computing(program: Program, passed: frozenset[str]) -> list[fx.Node]:
    """The nodes but for those that check the captured precision, or are passed over."""
    left_out = {"_assert_tensor_metadata", *passed}
    nodes = program.graph.graph.nodes
    return [n for n in nodes if n.op != "call_function" or base_name(n) not in left_out]


def _held(keep: Keep, built: Program, node: fx.Node, other: fx.Node) -> str | None:
    """How the tensors that two nodes stand for differ."""
    dense = keep.coupling.program
    name, theirs = dense.tensors.get(node), built.tensors.get(other)
    mine: Any = None
    other_value: Any = None
    if name in dense.anonymous:
        mine, other_value = dense.constants[str(name)], built.constants.get(str(theirs))
    elif name != theirs:
        return f"its code reads {theirs} in place of {name}"
    elif node.op == "get_attr":
        mine = getattr(dense.graph, str(node.target))
        other_value = getattr(built.graph, str(other.target))
    if isinstance(mine, torch.Tensor):
        picked = keep.tensors.get(str(name))
        mine = take(mine, picked) if picked is not None else mine
        if not isinstance(other_value, torch.Tensor) or not _equal(mine, other_value):
            return f"its code holds another constant at {node.name}"
    return None


def _equal(mine: torch.Tensor, other: torch.Tensor) -> bool:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return False
    return not mine.is_meta and not other.is_meta and torch.equal(mine, other)


def _arguments(
    keep: Keep,
    pairs: Mapping[fx.Node, fx.Node],
    passed: frozenset[str],
    node: fx.Node,
    other: fx.Node,
) -> str | None:
    """How the arguments of two nodes differ, beyond the sizes that the counts tell."""
    sizes: dict[_Path, int] = {}
    if node.op == "call_function":
        sizes = {
            tuple(literal.path): literal.sign * count
            for literal, value, _, count in keep.literals(node)
            if not isinstance(value, fx.Node)
        }
    pinned: dict[_Path, Any] = dict.fromkeys(((name,) for name in keep.pins(node)), _ABSENT)
    mine = {**pinned, **dict(_leaves((node.args, node.kwargs)))}
    theirs = {**pinned, **dict(_leaves((other.args, other.kwargs)))}
    for path in {**mine, **theirs}:
        wanted, got = mine.get(path, _ABSENT), theirs.get(path, _ABSENT)
        if path in pinned:
            wanted = keep.pins(node)[str(path[0])]
        if isinstance(wanted, fx.Node):
            wanted = pairs.get(_source(wanted, passed))
            if isinstance(got, fx.Node) and _source(got, passed) is wanted:
                continue
        elif path in sizes:
            wanted = sizes[path]
        if type(wanted) is not type(got) or not _same(wanted, got):
            shown = "nothing" if got is _ABSENT else got
            return f"{node.target} gets {shown} where {wanted} is needed"
    return None


def _same(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, torch.device):  # one of them may have been moved from the meta device
        return True
    if isinstance(wanted, float):
        return math.isclose(wanted, got, rel_tol=1e-12) or str(wanted) == str(got)
    return bool(wanted == got)


def _leaves(arguments: tuple[Any, Any]) -> Iterator[tuple[_Path, Any]]:
    """Arguments by path, as `Literal.path` has it: number or keyword, then items."""
    args, kwargs = arguments
    for key, value in (*enumerate(args), *kwargs.items()):
        yield from _inside(value, (key,))


def _inside(value: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, list | tuple):
        yield (*path, "length"), len(value)
        for i, item in enumerate(value):
            yield from _inside(item, (*path, i))
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from _inside(getattr(value, name), (*path, name))
    else:
        yield path, value
