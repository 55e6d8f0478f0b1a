"""Functions compiled again from their edited source: same globals, cells, defaults and wrappers."""

from __future__ import annotations
import __future__

import ast
import functools
import hashlib
import inspect
import linecache
import operator
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Names that a patch gives to the functions that the source calls.
CALLED = "_depcut_"

# A position in the source of a function: lines from 0, columns in bytes.
Span = tuple[int, int, int, int]

_FUTURE = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


_OURS = "<depcut "  # how the names of files of patched functions begin


class NoSourceError(Exception):
    """A function whose source is not to be had, or is not what its code was compiled from."""


@dataclass(frozen=True)
class Source:
    """The source of a function.

    Attributes:
        text: From its `def`, decorators left out, to its end, indented as in the file.
        line: Number of its first line in the file.
        tree: Its syntax tree, in positions of the file.
    """

    text: str
    line: int
    tree: ast.FunctionDef

    @property
    def digest(self) -> str:
        """A hash of the text without its indentation."""
        return hashlib.sha256(textwrap.dedent(self.text).encode()).hexdigest()[:16]

    def span(self, node: ast.AST) -> Span:
        """The position of one of its expressions."""
        at: Any = node
        first = self.line
        return at.lineno - first, at.col_offset, at.end_lineno - first, at.end_col_offset


def source_of(code: types.CodeType) -> Source:
    """The source that a function was compiled from.

    Raises:
        NoSourceError: There is none, or it was changed since.
    """
    return _source_of(code, code.co_filename)  # codes of two files may be equal


@functools.cache
def _source_of(code: types.CodeType, _filename: str) -> Source:
    lines = linecache.getlines(code.co_filename)
    if not lines:
        raise NoSourceError(f"the source of {code.co_name} is not at hand")
    tree = _tree(code.co_filename, "".join(lines))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name == code.co_name
        and code.co_firstlineno in (node.lineno, *(d.lineno for d in node.decorator_list))
    ]
    if len(found) != 1:
        raise NoSourceError(f"{code.co_name} is not where its code says it is")
    [node] = found
    end = node.end_lineno or node.lineno
    source = Source("".join(lines[node.lineno - 1 : end]), node.lineno, node)
    if lines[node.lineno - 1][: node.col_offset].strip():
        raise NoSourceError(f"{code.co_name} does not stand on lines of its own")
    if not code.co_filename.startswith(_OURS):
        made = _made(code.co_filename, "".join(lines)).get((code.co_name, code.co_firstlineno), [])
        if not any(_is_alike(each, code) for each in made):
            raise NoSourceError(f"the source of {code.co_name} is not what runs")
    return source


@functools.lru_cache(maxsize=64)
def _tree(filename: str, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise NoSourceError(f"{filename} cannot be read: {error}") from error


@functools.lru_cache(maxsize=64)
def _made(filename: str, text: str) -> dict[tuple[str, int], list[types.CodeType]]:
    """The codes that the text of a file is compiled to, by name and first line."""
    out: dict[tuple[str, int], list[types.CodeType]] = {}
    try:
        pending = [compile(text, filename, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError) as error:  # a cell of a notebook that awaits something
        raise NoSourceError(f"{filename} cannot be compiled: {error}") from error
    while pending:
        code = pending.pop()
        out.setdefault((code.co_name, code.co_firstlineno), []).append(code)
        pending += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return out


def _is_alike(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two codes do the same, wherever they stand."""
    if any(name.startswith("@py") for name in other.co_varnames + other.co_names):
        return True  # pytest rewrote the assertions of a test module
    return (
        one.co_code == other.co_code
        and one.co_names == other.co_names
        and one.co_varnames == other.co_varnames
        and len(one.co_consts) == len(other.co_consts)
        and all(
            _is_alike(a, b)
            if isinstance(a, types.CodeType) and isinstance(b, types.CodeType)
            else type(a) is type(b) and (a == b or repr(a) == repr(b))
            for a, b in zip(one.co_consts, other.co_consts, strict=True)
        )
    )


def holds(code: types.CodeType, inner: types.CodeType) -> bool:
    """Whether code is another, or a function (lambda, comprehension) that stands inside of it."""
    return code is inner or any(
        isinstance(const, types.CodeType) and holds(const, inner) for const in code.co_consts
    )


def reachable(value: Any, inner: types.CodeType, depth: int = 8) -> types.FunctionType | None:
    """The function with that code: the value itself, or one that its wrappers close over.

    Args:
        value: A function, method, staticmethod, partial...
        inner: Code that the function holds.
        depth: How many wrappers are looked into.
    """
    if depth == 0:
        return None
    if isinstance(value, types.FunctionType):
        if holds(value.__code__, inner):
            return value
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        inside = [c.cell_contents for n, c in cells if is_filled(c) and not n.startswith(CALLED)]
    else:
        inside = [f for f in (getattr(value, name, None) for name in _WRAPPED) if f is not None]
    for item in inside:
        if callable(item) or isinstance(item, staticmethod | classmethod):
            found = reachable(item, inner, depth - 1)
            if found is not None:
                return found
    return None


_WRAPPED = ("__func__", "func", "__wrapped__")


def is_filled(cell: types.CellType) -> bool:
    """Whether a cell holds something."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def rewrapped(value: Any, old: types.FunctionType, new: types.FunctionType) -> Any:
    """A function with one of those it closes over exchanged, the wrappers in between made anew.

    Args:
        value: A function, method, staticmethod, classmethod or partial.
        old: The function that is exchanged.
        new: What takes its place.
    """
    if value is old:
        return new
    if isinstance(value, staticmethod | classmethod):
        return type(value)(rewrapped(value.__func__, old, new))
    if isinstance(value, types.MethodType):
        return types.MethodType(rewrapped(value.__func__, old, new), value.__self__)
    if isinstance(value, functools.partial):
        return type(value)(rewrapped(value.func, old, new), *value.args, **value.keywords)
    if not isinstance(value, types.FunctionType) or reachable(value, old.__code__) is None:
        return value
    cells = tuple(_exchanged(cell, old, new) for cell in value.__closure__ or ())
    copied = with_code(value, value.__code__, cells)
    if hasattr(copied, "__wrapped__"):
        copied.__wrapped__ = rewrapped(copied.__wrapped__, old, new)
    return copied


def _exchanged(
    cell: types.CellType, old: types.FunctionType, new: types.FunctionType
) -> types.CellType:
    if not is_filled(cell):
        return cell
    content = rewrapped(cell.cell_contents, old, new)
    return cell if content is cell.cell_contents else types.CellType(content)


def with_code(
    function: types.FunctionType, code: types.CodeType, closure: tuple[types.CellType, ...]
) -> types.FunctionType:
    """A function with other code and cells and everything else of the original."""
    new = types.FunctionType(code, function.__globals__, function.__name__, None, closure)
    new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    new.__doc__, new.__annotations__ = function.__doc__, dict(function.__annotations__)
    new.__dict__.update(function.__dict__)
    return new


def edited(text: str, edits: Mapping[Span, str]) -> str:
    """A text with the parts at some positions exchanged; none lies in another."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    for (line, column, end, end_column), new in sorted(edits.items(), reverse=True):
        tail = lines[end][end_column:]
        lines[line : end + 1] = [lines[line][:column] + new.encode() + tail]
    return b"".join(lines).decode()


def text_at(text: str, span: Span) -> str:
    """The part of a text at a position."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    line, column, end, end_column = span
    if line == end:
        return lines[line][column:end_column].decode()
    middle = lines[line + 1 : end]
    return b"".join([lines[line][column:], *middle, lines[end][:end_column]]).decode()


def recompiled(
    function: types.FunctionType, text: str, extra: Mapping[str, Callable[..., Any]]
) -> types.FunctionType:
    """A function compiled again from another text.

    The text is compiled inside of a class of the same name (private names), inside of a function
    whose parameters are the free variables, so that the original's cells can be bound to the code.

    Args:
        function: The original.
        text: The new source.
        extra: Further names that the text uses.

    Raises:
        NoSourceError: The text does not compile to a function of that kind.
    """
    code = function.__code__
    new = _compiled(function, text, extra)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    cells |= {key: types.CellType(value) for key, value in extra.items()}
    if not set(new.co_freevars) <= set(cells):
        raise NoSourceError(f"{function.__qualname__} refers to a class that is not at hand")
    if hasattr(code, "co_qualname"):
        new = new.replace(co_qualname=code.co_qualname)
    return with_code(function, new, tuple(cells[n] for n in new.co_freevars))


def _compiled(function: types.FunctionType, text: str, extra: Iterable[str]) -> types.CodeType:
    """The code of a text in the surroundings of a function; `extra` are further free variables."""
    code = function.__code__
    owner = function.__qualname__.split(".<locals>.")[-1].rpartition(".")[0].rpartition(".")[2]
    free = [n for n in dict.fromkeys((*code.co_freevars, *extra)) if n != "__class__"]
    within = owner if owner.isidentifier() else "_"
    whole = ast.parse(f"def _outer({', '.join(free)}):\n class {within}: pass")
    if text[:1].isspace():
        text = "if 1:\n" + text
    file = _registered(f"{_OURS}{function.__module__}.{function.__qualname__}>", text)
    try:
        [statement] = ast.parse(text).body
        definition: Any = statement.body[0] if isinstance(statement, ast.If) else statement
        definition.decorator_list = []
        whole.body[0].body[0].body = [definition]  # type: ignore[attr-defined]
        compiled = compile(whole, file, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    except SyntaxError as error:
        raise NoSourceError(f"{function.__qualname__} cannot be compiled again") from error
    outer = next(_codes(compiled, "_outer"))
    return next(_codes(next(_codes(outer, within)), code.co_name))


def _registered(name: str, text: str) -> str:
    """A file name under which tracebacks, `inspect` and a later capture find the text."""
    unique = f"{name[:-1]} {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
    linecache.cache[unique] = (len(text), None, text.splitlines(keepends=True), unique)
    return unique


def _codes(code: types.CodeType, name: str) -> Iterator[types.CodeType]:
    for const in code.co_consts:
        if isinstance(const, types.CodeType) and const.co_name == name:
            yield const


def method_holding(kind: type, code: types.CodeType) -> tuple[str, types.FunctionType] | None:
    """The attribute of a class, or of its bases, whose function holds some code, and that function.

    Args:
        kind: The class.
        code: The code.
    """
    for base in kind.__mro__:
        for name, value in vars(base).items():
            if callable(value) or isinstance(value, staticmethod | classmethod | property):
                found = reachable(value.fget if isinstance(value, property) else value, code)
                if found is not None and inspect.getattr_static(kind, name) is value:
                    return name, found
    return None
