"""Whether code that gets a value can read more of it than its shape.

A value that nothing computes with in the example calls may be read in a branch that they do not
run. Only what the source shows to be read for its shape alone, wherever it goes, is no value.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import fx

from depcut.capture.program import ModuleCall, Program
from depcut.capture.provenance import call_of
from depcut.support.torch_private import pytree

# Attributes of a tensor that say nothing of its values.
_OF_SHAPES = frozenset({"shape", "size", "ndim", "dim", "device", "dtype"})


def read_for_shape_alone(node: fx.Node, program: Program) -> bool:
    """Whether the code reads nothing of a value but its shape, in branches that did not run, too.

    Args:
        node: A node that nothing uses.
        program: The graph that it is in.
    """
    number = call_of(node)
    if node.users or number is None or not program.torch_calls[number].frames:
        return False
    expression: Any = program.torch_calls[number].frames[0].node
    around: Any = getattr(expression, "parent", None)  # set by `executing`
    if _is_shape(expression, around):
        return True
    if not isinstance(around, ast.Call):
        return False
    given = [*around.args, *(keyword.value for keyword in around.keywords)]
    passed = [(call, i) for call in program.calls for i, x in enumerate(call.leaves) if x is node]
    returned = any(leaf is node for call in program.calls for leaf in call.out_leaves)
    return (
        any(argument is expression for argument in given)
        and not returned
        and len(passed) == 1
        and _takes_shape(program, *passed[0])
    )


def _takes_shape(program: Program, call: ModuleCall, position: int) -> bool:
    """Whether the forward of a module reads nothing of an argument but its shape."""
    calls = (c for c in program.torch_calls if c.module == call.module and c.frames)
    codes = list({c.frames[-1].code for c in calls})
    args, kwargs = pytree.tree_unflatten(list(range(len(call.leaves))), call.spec)
    if len(codes) != 1 or codes[0].co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(codes[0])))
    except (OSError, SyntaxError):
        return False
    names = dict(zip(codes[0].co_varnames[1 : codes[0].co_argcount], args, strict=False)) | kwargs
    named = [name for name, value in names.items() if value == position]
    if len(named) != 1:
        return False
    shapes = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in _OF_SHAPES
    }
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == named[0]]
    return all(id(use) in shapes for use in uses)


def _is_shape(expression: ast.AST, around: Any) -> bool:
    return (
        isinstance(around, ast.Attribute)
        and around.value is expression
        and around.attr in _OF_SHAPES
    )
