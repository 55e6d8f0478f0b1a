"""Every test asserts something on every path: none passes because a list was empty."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import coverage
import pytest
import untraced

HERE = Path(__file__).parent
HELPERS = [path for path in sorted(HERE.rglob("*.py")) if not path.name.startswith("test_")]
# Calls and context managers that fail by themselves.
FAIL = {
    "raises", "warns", "assert_close", "assert_allclose", "assert_array_equal", "fail",
    "check=True",  # of subprocess.run
}  # fmt: skip


@cache
def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@cache
def called(node: ast.AST) -> set[str]:
    """Names, without what they belong to, of all that is called below a node for certain."""
    if isinstance(node, ast.comprehension | ast.ListComp | ast.GeneratorExp | ast.Lambda):
        return set()
    names = {name for child in ast.iter_child_nodes(node) for name in called(child)}
    if isinstance(node, ast.Call):
        names |= {f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords}
        names.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
    return names


def surely_runs(iterated: ast.expr) -> bool:
    """Whether a loop has a first turn for certain: it runs over what is written there."""
    if isinstance(iterated, ast.Call):
        name = getattr(iterated.func, "id", "")
        if name == "range":
            return all(isinstance(a, ast.Constant) for a in iterated.args)
        return name in ("enumerate", "zip") and any(surely_runs(a) for a in iterated.args)
    if isinstance(iterated, ast.IfExp):
        return surely_runs(iterated.body) and surely_runs(iterated.orelse)
    return bool(getattr(iterated, "elts", ()) or getattr(iterated, "keys", ()))


def asserts(body: list[ast.stmt], failing: set[str]) -> bool:
    """Whether these statements assert something whichever way they take."""
    for statement in body:
        match statement:
            case ast.Assert():
                return True
            case ast.Return():
                return bool(statement.value and called(statement.value) & failing)
            case ast.With(items=items, body=inner):
                if asserts(inner, failing) or any(called(item) & failing for item in items):
                    return True
            case ast.If(body=then, orelse=otherwise):
                if leaves(then) and not asserts(then, failing):
                    return False
                if asserts(then, failing) and asserts(otherwise, failing):
                    return True
            case ast.For(iter=iterated, body=inner):
                if surely_runs(iterated) and asserts(inner, failing):
                    return True
            case ast.Try(body=inner, finalbody=last):
                if asserts(inner, failing) or asserts(last, failing):
                    return True
            case ast.Expr() | ast.Assign() | ast.AnnAssign() if called(statement) & failing:
                return True
    return False


def leaves(body: list[ast.stmt]) -> bool:
    """Whether a branch ends the test in silence; a skip is reported."""
    return any(isinstance(statement, ast.Return) for statement in body)


def failing_functions(trees: list[ast.AST], named: set[str]) -> set[str]:
    """Functions that fail by themselves, those that call one of them or of the named included."""
    failing, known = named, [f for tree in trees for f in functions(tree)]
    while True:
        more = {f.name for f in known if asserts(f.body, failing)} - failing
        if not more:
            return failing
        failing = failing | more


SHARED = failing_functions([ast.parse(path.read_text()) for path in HELPERS], FAIL)


def silent(tree: ast.AST) -> list[str]:
    """Tests of a module that may pass without having asserted anything."""
    tests = [f for f in functions(tree) if f.name.startswith("test_")]
    failing = failing_functions([tree], SHARED) - {f.name for f in tests}
    return [f"{f.name}, line {f.lineno}" for f in tests if not asserts(f.body, failing)]


def test_every_test_asserts_on_every_path() -> None:
    files = sorted(HERE.rglob("test_*.py"))
    assert len(files) > 100
    found = {f.name: silent(ast.parse(f.read_text())) for f in files}
    assert {name: tests for name, tests in found.items() if tests} == {}


@pytest.mark.parametrize(
    "body",
    ["f()", "for x in found(): assert x", "if a: assert b", "if a: return\n  assert b",
     "with opened(): pass", "run(a, check=b)", "for x in (1,) if a else (): assert x",
     "try: f()\n  except ValueError: assert a", "[helper(x) for x in a]"],
)  # fmt: skip
def test_what_may_assert_nothing_is_found(body: str) -> None:
    code = f"def helper(x):\n  assert x\ndef test_a():\n  {body}\n"
    assert silent(ast.parse(code)) == ["test_a, line 3"]


@pytest.mark.parametrize(
    "body",
    ["assert a", "for x in (1, 2): assert x", "with pytest.raises(E): f()", "helper(1)",
     "if a: assert b\n  else: assert c", "for i in range(3):\n    helper(i)",
     "if a:\n    assert b\n    return\n  assert c", "subprocess.run(a, check=True)",
     "for i in (1,) if a else (2, 3): assert i"],
)  # fmt: skip
def test_what_asserts_is_not(body: str) -> None:
    code = f"def helper(x):\n  assert x\ndef test_a():\n  {body}\n"
    assert silent(ast.parse(code)) == []


def test_names_of_untraced_tests_are_those_of_tests() -> None:
    places = [name.split("::") for name in sorted(untraced.untraced())]
    files = {path.name: path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py")}
    assert len(places) > 100
    assert [p for p in places if f"def {p[1]}(" not in files.get(p[0], "")] == []


def test_what_no_other_test_runs_stays_traced() -> None:
    lines = {"a": {(0, 1, 2)}, "b": {(0, 1, 2), (0, 2, 3)}, "c": {(0, 1, 2)}, "": set()}
    assert untraced.needless(lines, {"a": 3.0, "b": 9.0, "c": 2.0}) == ["a", "c"]
    assert untraced.needless(lines, {"a": 3.0, "c": 0.5}) == ["a"]
    without = {"a": {(0, 1, 2)}, "c": {(0, 1, 2)}}
    assert untraced.needless(without, {"a": 3.0, "c": 4.0}) == ["c"]


def test_arcs_are_those_of_each_test_function(tmp_path: Path) -> None:
    data = coverage.CoverageData(str(tmp_path / "data"))
    for context, arcs in (
        ("tests/field/test_a.py::test_one[x]|run", [(1, 2)]),
        ("tests/field/test_a.py::test_one[y]|run", [(2, 3)]),
        ("tests/field/test_a.py::test_one[y]|setup", [(7, 8)]),
        ("", [(8, 9)]),
    ):
        data.set_context(context)
        data.add_arcs({"f.py": arcs})
    data.write()
    found = untraced.arcs(tmp_path / "data")
    assert found == {"test_a.py::test_one": {(1, 1, 2), (1, 2, 3)}, "": {(1, 7, 8), (1, 8, 9)}}
