"""An operator in one place: what every family says, and that it says it of the operator."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import depcut
from depcut.calibration.sites import find_sites
from depcut.errors import RuleError
from depcut.ops.form import FORMS, Form, form
from depcut.ops.registry import RULES, Table, rule_for, unregister
from depcut.ops.site import SITES, ContractionOp, Site, site
from depcut.ops.taint import TAINTS, TaintedOp, multilinear, taints
from depcut.reference.constants import interpret

# What a rule records, as its code has it ----------------------------------------------------------


@cache
def records(function: Callable[..., Any]) -> frozenset[str]:
    """Methods that a rule calls, also through functions of the same package."""
    called: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called.add(node.func.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            inner = function.__globals__.get(node.func.id)
            if inspect.isfunction(inner) and inner.__module__.startswith("depcut.ops."):
                called |= records(inner)
    return frozenset(called)


CONTRACTING = sorted(name for name, rule in RULES.items() if "contract" in records(rule))

# Aspects that a contracting operator does without, and why.
MACS, TAINT, FORM, SITE = "MACs", "taint rule", "form", "site"
SUM = "it sums one operand: no products, no weights"
ACTIVATIONS = "it multiplies activations"
ROUTED = "rows go to experts by number: which of them an expert reads is not known"
WITHOUT: dict[str, tuple[str, set[str]]] = {
    **dict.fromkeys(
        ["aten.sum", "aten.nansum", "aten.linalg_vector_norm", "aten.norm", "aten.count_nonzero"],
        (SUM, {MACS, FORM, SITE}),
    ),
    "aten.cosine_similarity": (
        "the sum is divided by norms: neither linear nor of known constants",
        {MACS, TAINT, FORM, SITE},
    ),
    "aten.scaled_dot_product_attention": (ACTIVATIONS, {SITE}),
    **dict.fromkeys(
        ["aten.dot", "aten.vdot", "aten.mv", "aten.addmv"],
        ("one vector gives no second moments", {SITE}),
    ),
    "aten.bilinear": ("two activations for each weight", {SITE}),
    **dict.fromkeys(
        ["aten._grouped_mm", "transformers.grouped_mm_fallback"], (ROUTED, {TAINT, FORM, SITE})
    ),
    **dict.fromkeys(
        ["aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input"],
        ("what it computes is read again at the next step", {TAINT, FORM}),
    ),
}


@pytest.mark.parametrize("name", CONTRACTING)
def test_a_contracting_operator_is_known_in_every_respect(name: str) -> None:
    tables: list[tuple[str, Table[Any]]] = [(TAINT, TAINTS), (FORM, FORMS), (SITE, SITES)]
    missing = {aspect for aspect, table in tables if name not in table}
    if "macs" not in records(RULES[name]):
        missing.add(MACS)
    assert missing == WITHOUT.get(name, ("", set()))[1]


def test_contracting_operators_are_found() -> None:
    assert len(CONTRACTING) > 25
    assert WITHOUT.keys() <= set(CONTRACTING)
    assert {"aten.linear", "aten.conv2d", "aten.lstm.input", "aten.einsum"} <= set(CONTRACTING)


# Their dimensions freeze, their taint is known all the same.
WITHOUT_RULE = {"aten.diagonal", "aten.empty_strided"}


def has_rule(name: str) -> bool:
    """Whether some overload of an operator has a rule, be it by the tag of pointwise ones."""
    packet = getattr(torch.ops.aten, name.split(".")[1], None)
    if packet is None:
        return name in RULES
    return any(rule_for(getattr(packet, o)) is not None for o in packet.overloads())


@pytest.mark.parametrize("table", [TAINTS, FORMS, SITES], ids=lambda table: table.aspect)
def test_aspects_are_of_operators_with_a_rule(table: Table[Any]) -> None:
    names = set(table) - {"pointwise"}
    assert {n for n in names if not has_rule(n)} <= WITHOUT_RULE


# Arguments that torch types as sizes, and why the rule has no literal for them.
POSITIONS = "positions, which stay"
SIZES: dict[str, str] = {
    "pool": POSITIONS,
    "col2im": POSITIONS,
    "positions": "numbers that depend on the position, which stay",
    "along": "lengths of a Fourier transform, which stay",
    "histogram": "bins, which stay",
    "topk": "positions chosen by value",
    "triangle": "the number of a diagonal of two dimensions that stay",
    "embedding": "a number of the vocabulary, which stays",
    "tensor_split": "a number of pieces, not a size",
    "channel_shuffle": "a number of groups, which stay",
    "nothing": "checks of the dense sizes, which are not run",
}


def sizes_among(target: str) -> set[str]:
    """Names of an operator's arguments that torch types as symbolic sizes."""
    name, *overload = target.removeprefix("aten.").split(".")
    packet = getattr(torch.ops.aten, name)
    schemas = [str(getattr(packet, o)._schema) for o in overload or packet.overloads()]
    return {n for s in schemas for n in re.findall(r"SymInt(?:\[\d*\])?\??\s+(\w+)", s)}


def test_every_rule_of_an_operator_with_sizes_records_them() -> None:
    silent = {
        rule.__name__: sizes_among(name)
        for name, rule in RULES.items()
        if name.startswith("aten.")
        and sizes_among(name)
        and not records(rule) & {"literal", "literals"}
    }
    assert silent.keys() == SIZES.keys(), silent


# Forms and taint say what the operator computes ---------------------------------------------------


class Products(nn.Module):
    """One product of what the model is given and a parameter."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.run = run
        self.w = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.w).sum() + x.sum(-1)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (F.linear, (5, 4)),
    "matmul": (lambda x, w: x @ w, (4, 5)),
    "matmul_batches": (lambda x, w: x @ w, (3, 4, 5)),
    "mv": (torch.mv, (4,)),
    "dot": (lambda x, w: torch.dot(x.flatten(), w.repeat(3)), (4,)),
    "vdot": (lambda x, w: torch.vdot(x.flatten(), w.repeat(3)), (4,)),
    "inner": (torch.inner, (5, 4)),
    "inner_more": (torch.inner, (2, 5, 4)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(5), x, w), (4, 5)),
    "addmv": (lambda x, w: torch.addmv(torch.zeros(3), x, w), (4,)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(1, 1, 5), x[None], w[None]), (4, 5)),
    "bilinear": (lambda x, w: F.bilinear(x, x * 2, w), (5, 4, 4)),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (5, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_form_sums_what_the_operator_sums(name: str) -> None:
    run, shape = PRODUCTS[name]
    model, x = Products(run, *shape).eval(), torch.randn(3, 4)
    coupling = depcut.analyze(model, x).coupling
    seen: list[tuple[Tensor, Tensor]] = []

    def look(op: TaintedOp) -> None:
        find = FORMS.find(op.node.target)
        made = find(op) if find is not None else None
        if made is not None:
            values = [op.value(n) for n in made.operands]
            seen.append((made.sum_to("", values), op.run(op.value).sum()))

    interpret(coupling, model, look)
    (found,) = seen
    torch.testing.assert_close(found[0].squeeze(), found[1])


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_zeros_is_not_tainted(name: str) -> None:
    run, shape = PRODUCTS[name]
    model, x = Products(run, *shape).eval(), torch.randn(3, 4)
    coupling = depcut.analyze(model, x).coupling

    def taint() -> Tensor:
        seen: list[Tensor] = []

        def look(op: TaintedOp) -> None:
            # The sum reads the product alone.
            if str(op.node.target) == "aten.sum.default":
                seen.append(op.taint(op.node.args[0]).clone())

        interpret(coupling, model, look)
        return seen[0]

    assert bool((taint() == 1).all())
    with torch.no_grad():
        model.w.zero_()
    assert bool((taint() == 0).all())


# An operator of one's own, in one file -----------------------------------------------------------


@torch.library.custom_op("depcut_test::mix", mutates_args=())
def mix(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of x times rows of the weight."""
    return x @ weight.T


@mix.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


MIX = "depcut_test.mix"


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 16)
        self.weight = nn.Parameter(torch.randn(8, 16) / 4)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(mix(torch.relu(self.up(x)), self.weight))


@pytest.fixture
def own_operator() -> Iterator[None]:
    """An operator with all of its aspects, as CONTRIBUTING shows it."""
    from depcut.ops.contraction import matrix_sites

    @depcut.rule(MIX)
    def rule(op: depcut.Op) -> Any:
        x, weight = op.dims("x"), op.dims("weight")
        op.unify(x[-1], weight[1])
        op.contract("weight", 1, against=("x", -1))
        op.macs(*x[:-1], *weight)
        return (*x[:-1], weight[0])

    @taints(MIX)
    def taint(op: TaintedOp) -> Any:
        return multilinear(op, ("x", "weight"))

    @form(MIX)
    def product(op: TaintedOp) -> Form:
        return Form((op.arg("x"), op.arg("weight")), (("b", "i"), ("o", "i")))

    @site(MIX)
    def sites(op: ContractionOp) -> list[Site]:
        return matrix_sites(op, "x", -1, ("weight", 1), ())

    yield
    unregister(MIX)
    for table in (TAINTS, FORMS, SITES):
        table.pop(MIX)


def test_an_operator_of_ones_own_is_repaired_and_compacted(own_operator: None) -> None:
    model, x = Mixing().eval(), torch.randn(64, 6)
    analysis = depcut.analyze(model, x)
    assert {s.name for s in find_sites(analysis.coupling)} == {"up", "weight", "out"}
    plan = analysis.plan(0.5, align=1)
    slim = plan.apply(model, data=[x, x])
    repairs = {r.layer: r for r in depcut.report(slim).compensation.repairs}
    assert repairs["weight"].after < repairs["weight"].before
    with torch.no_grad():
        model.weight[:, :5] = 0  # what these columns read is dead
    assert depcut.compaction(model, x).removed["up"] == 5


@pytest.mark.parametrize("table", [RULES, TAINTS, FORMS, SITES], ids=lambda table: table.aspect)
def test_a_second_function_for_an_operator_is_refused(table: Table[Any]) -> None:
    before = dict(table)
    with pytest.raises(RuleError, match=rf"aten\.linear has a {table.aspect} already: depcut\.ops"):
        table.register("aten.linear")(lambda _: None)
    assert before == table


def test_an_operator_in_place_is_known_as_the_other_one() -> None:
    aten = torch.ops.aten
    assert TAINTS.find(aten.mul_.Tensor) is TAINTS["aten.mul"]
    assert RULES.find(aten.addmm_.default) is RULES["aten.addmm"]
    assert RULES.find(aten.__and__.Tensor) is RULES["aten.__and__"]
